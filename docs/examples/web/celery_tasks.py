"""Tasks of Celery, whose client is made once, before its worker forks.

    celery --app celery_tasks worker --pool prefork --concurrency 4

Queue and results are directories here; elsewhere they are a broker's and a database's.
"""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery

from kms import KmsClient

kms = KmsClient.from_env()

_PLACE = Path(os.environ.get("CELERY_PLACE", "."))
app = Celery("celery_tasks", broker="filesystem://", backend=f"file://{_PLACE.absolute()}/results")
app.conf.broker_transport_options = {
    "data_folder_in": str(_PLACE / "queue"),
    "data_folder_out": str(_PLACE / "queue"),
    "control_folder": str(_PLACE / "control"),
}


@app.task
def there_and_back(text: str) -> str:
    """TEXT, having been encrypted and decrypted meanwhile."""
    return kms.decrypt(kms.encrypt(text.encode(), aad=b"celery"), aad=b"celery").decode()
