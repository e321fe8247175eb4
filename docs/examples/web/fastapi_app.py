"""A FastAPI program: functions that run in threads share a `KmsClient`, those of the event loop an `AsyncKmsClient`.

uvicorn fastapi_app:app
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response

from kms import AsyncKmsClient, KmsClient

kms = KmsClient.from_env()


@asynccontextmanager
async def lifespan(application: FastAPI) -> AsyncIterator[None]:
    """The async client lives as long as the event loop does."""
    async with await AsyncKmsClient.from_env() as client:
        application.state.kms = client
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/")
def in_a_thread(text: str) -> Response:
    """`GET /?text=TEXT` answers TEXT."""
    return Response(kms.decrypt(kms.encrypt(text.encode())), media_type="application/octet-stream")


@app.get("/async")
async def in_the_loop(text: str, request: Request) -> Response:
    """The same, without a thread."""
    client: AsyncKmsClient = request.app.state.kms
    return Response(await client.decrypt(await client.encrypt(text.encode())), media_type="application/octet-stream")
