"""Buckets of S3, and of all that speaks its language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from typing import Any

from lit_vlm.data.remote.store import PIECE, TIMEOUT, Changed, Entry, Interrupted, Listing, Store
from lit_vlm.data.remote.web import reason

MD5 = re.compile(r"[0-9a-f]{32}")
LATER = ("SlowDown", "Throttling", "RequestTimeout", "InternalError", "ServiceUnavailable")
"""Codes of errors that may be over soon, besides those of status 500 and above."""


class S3(Store):
    """Objects below a key. Credentials, region and endpoint are those that AWS's tools find; else public ones."""

    @property
    def home(self) -> str:
        """What tells this place from others: endpoint and bucket."""
        return f"{self._client.meta.endpoint_url} {self.address.place}"

    def listing(self) -> Listing:
        """The object at the key, or all below it.

        Raises:
            ValueError: where there is none, or none that may be read.
            Interrupted: where asking again may help.
        """
        key = self.address.path
        if key and (one := self.entry()) is not None:
            return Listing("", (one,))
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.address.place, Prefix=f"{key}/" if key else ""
            )
            found = [_entry(one["Key"], one["Size"], one["ETag"]) for page in pages for one in page.get("Contents", [])]
        except Exception as error:
            raise self._told(error) from error
        # Consoles make "folders" of no bytes.
        entries = sorted((one for one in found if not one.path.endswith("/")), key=lambda one: one.path)
        if not entries:
            raise ValueError(f"there is no {self.address}: no object has that key, and none lies below it")
        return Listing("", tuple(entries))

    def entry(self) -> Entry | None:
        """The object at the key; None where there is none.

        Raises:
            ValueError: where it may not be read.
            Interrupted: where asking again may help.
        """
        from botocore.exceptions import ClientError

        try:
            head = self._client.head_object(Bucket=self.address.place, Key=self.address.path)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise self._told(error) from error
        except Exception as error:
            raise self._told(error) from error
        return _entry(self.address.path, head["ContentLength"], head["ETag"])

    def stream(self, entry: Entry, start: int) -> Iterator[bytes]:
        """Yield the content of an object from a byte on; see `Store.stream`."""
        span = {"Range": f"bytes={start}-"} if start else {}
        try:
            answer = self._client.get_object(Bucket=self.address.place, Key=entry.path, IfMatch=entry.tag, **span)
            with closing(answer["Body"]) as body:
                yield from body.iter_chunks(PIECE)
        except Exception as error:
            raise self._told(error) from error

    def is_sound(self, entry: Entry) -> bool:
        """Whether the storage encrypts the object with a key of its own, so that its tag is no checksum."""
        head = self._client.head_object(Bucket=self.address.place, Key=entry.path)
        return str(head.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in head

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        session = boto3.Session()
        connect, silent = TIMEOUT
        plain: dict[str, Any] = {"connect_timeout": connect, "read_timeout": silent}
        # Attempts and checksums are those of `cached`, for all places alike.
        plain |= {"retries": {"total_max_attempts": 1}, "response_checksum_validation": "when_required"}
        known = session.get_credentials() is not None
        config = Config(**plain) if known else Config(signature_version=UNSIGNED, **plain)
        return session.client("s3", config=config)

    def _told(self, error: Exception) -> Exception:
        """An error of the client as the kit's: `Changed`, `Interrupted`, or one line."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            ConnectionError,
            HTTPClientError,
            IncompleteReadError,
        )
        from urllib3.exceptions import HTTPError

        if isinstance(error, ClientError):
            return self._answered(error.response)
        if isinstance(error, HTTPClientError | ConnectionError | IncompleteReadError | HTTPError | OSError):
            return Interrupted(reason(error))
        if isinstance(error, BotoCoreError):  # a profile that is not there, a token of a login that has expired
            return ValueError(f"{self.address} cannot be asked for: {error}; {_ADVICE}")
        return error

    def _answered(self, response: Any) -> Exception:
        status, code = response["ResponseMetadata"]["HTTPStatusCode"], str(response["Error"].get("Code", ""))
        if status in (412, 416) or code == "NoSuchKey":
            return Changed(f"{self.address} has changed")
        if code == "NoSuchBucket":
            return ValueError(f"{self.address}: there is no bucket {self.address.place}")
        if status >= 500 or status == 429 or code.startswith(LATER):
            return Interrupted(f"the storage answers with status {status} ({code})")
        if status in (400, 401, 403):
            return ValueError(f"{self.address} may not be read ({code}): {_ADVICE}")
        return ValueError(f"{self.address}: the storage answers with status {status} ({code})")


_ADVICE = "AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY say who asks, AWS_REGION where the bucket lies"


def _entry(path: str, size: int, tag: str) -> Entry:
    digest = tag.strip('"')  # a checksum, if the object was uploaded in one part
    return Entry(path, size, tag, f"md5:{digest}" if MD5.fullmatch(digest) else "")
