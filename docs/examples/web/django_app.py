"""A Django program in one file, whose threads share a client.

python django_app.py runserver
"""

from __future__ import annotations

import os
import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpRequest, HttpResponse
from django.urls import path

from kms import KmsClient

kms = KmsClient.from_env()

settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["127.0.0.1"],
    # Any: nothing is signed here.
    SECRET_KEY=os.urandom(32).hex(),
    DEBUG=True,
)


def there_and_back(request: HttpRequest) -> HttpResponse:
    """`GET /?text=TEXT` answers TEXT."""
    sealed = kms.encrypt(request.GET["text"].encode(), aad=b"django")
    return HttpResponse(kms.decrypt(sealed, aad=b"django"), content_type="application/octet-stream")


urlpatterns = [path("", there_and_back)]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
