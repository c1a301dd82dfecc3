"""Buckets of object storage: S3 and what speaks its language, and Google Cloud Storage."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from lit_vlm.data.remote.store import PIECE, Changed, Entry, Interrupted, Listing, Store
from lit_vlm.data.remote.web import BUSY, reason

MD5 = re.compile(r"[0-9a-f]{32}")


class Bucket(Store):
    """Objects below a key. Credentials are those that AWS's and Google's own tools find; without any, public ones."""

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
            found = [self._entry(meta) for page in self._client().list(key or None) for meta in page]
        except Exception as error:
            raise self._told(error) from error
        # Consoles make "folders" of no bytes.
        entries = sorted((one for one in found if not one.path.endswith("/")), key=lambda one: one.path)
        if not entries:
            raise ValueError(f"there is no {self.address}: no object has that key, and none lies below it")
        return Listing("", tuple(entries))

    def stream(self, entry: Entry, start: int) -> Iterator[bytes]:
        """Yield the content of an object from a byte on; see `Store.stream`."""
        import obstore

        options: dict[str, Any] = {"range": {"offset": start}} if start else {}
        if entry.tag:
            options["if_match"] = entry.tag
        try:
            if not entry.size:
                return
            for piece in obstore.get(self._client(), entry.path, options=options).stream(min_chunk_size=PIECE):
                yield bytes(piece)
        except Exception as error:
            raise self._told(error) from error

    def is_sound(self, entry: Entry, found: str) -> bool:
        """Whether the storage encrypts the object with a key of its own, so that its tag is no checksum."""
        if self.address.scheme != "s3":
            return False
        import boto3

        head = boto3.client("s3").head_object(Bucket=self.address.place, Key=entry.path)
        return str(head.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in head

    def entry(self) -> Entry | None:
        """The object at the key; None where there is none.

        Raises:
            ValueError: where it may not be read.
            Interrupted: where asking again may help.
        """
        try:
            return self._entry(self._client().head(self.address.path))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._told(error) from error

    def _entry(self, meta: Any) -> Entry:
        tag = meta["e_tag"] or ""
        digest = tag.strip('"')
        # Of an object that was uploaded in one part the tag is a checksum; that of Google depends on how it came there.
        known = self.address.scheme == "s3" and MD5.fullmatch(digest)
        return Entry(meta["path"], meta["size"], tag, f"md5:{digest}" if known else "")

    @property
    def home(self) -> str:
        """What tells this place from others: endpoint and bucket."""
        return f"{_endpoint(self.address.scheme) or self.address.scheme} {self.address.place}"

    def _client(self) -> Any:
        from obstore.store import GCSStore, S3Store

        plain = {"retry_config": {"max_retries": 0}}  # `retried` does that, for all places alike
        if self.address.scheme == "gs":
            base = _endpoint("gs")
            stand_in = {"base_url": base, "skip_signature": True} if base else {}
            return GCSStore(self.address.place, client_options={"allow_http": bool(base)}, **stand_in, **plain)
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider

        session = boto3.Session()
        endpoint = _endpoint("s3")
        given: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        given |= {"region": session.region_name} if session.region_name else {}
        known = session.get_credentials() is not None
        given |= {"credential_provider": Boto3CredentialProvider(session)} if known else {"skip_signature": True}
        http = {"allow_http": (endpoint or "").startswith("http://")}
        return S3Store(self.address.place, client_options=http, **given, **plain)

    def _told(self, error: Exception) -> Exception:
        """An error of the client as the kit's: `Changed`, `Interrupted`, or one line."""
        from obstore.exceptions import PermissionDeniedError, PreconditionError, UnauthenticatedError

        if isinstance(error, ValueError | Interrupted | Changed):
            return error
        text = str(error)
        status = next(iter(re.findall(r"status code: (\d+)", text)), "")
        if isinstance(error, PreconditionError) or status == "416":
            return Changed(f"{self.address} has changed")
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in ("400", "401", "403"):
            code = next(iter(re.findall(r"<Code>(\w+)</Code>", text)), f"status {status}")
            return ValueError(f"{self.address} may not be read ({code}): {self._advice()}")
        if "NoSuchBucket" in text or (status == "404" and "list" in text):
            return ValueError(f"{self.address}: there is no bucket {self.address.place}")
        if isinstance(error, FileNotFoundError) or status == "404":
            return Changed(f"{self.address} has changed")  # what was listed is gone
        if status == "301":
            return ValueError(f"{self.address}: the bucket lies in another region: set AWS_REGION")
        if status and int(status) not in BUSY:
            return ValueError(f"{self.address}: the storage answers with status {status}")
        return Interrupted(f"the storage answers with status {status}" if status else _connection(text))

    def _advice(self) -> str:
        if self.address.scheme == "gs":
            return "log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
        return (
            "AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY say who asks, AWS_REGION where the bucket lies"
        )


def _endpoint(scheme: str) -> str | None:
    """The server to ask in place of the provider's own, by the variables that the providers' clients know."""
    if scheme == "gs":
        return os.environ.get("STORAGE_EMULATOR_HOST")
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _connection(text: str) -> str:
    causes = re.findall(r'(?:message|source): "([^"]+)"', text)
    known = reason(OSError(text.replace("\\n", " ")))
    return known if len(known) < 60 else next(iter(causes), text.strip().splitlines()[0])[:200]
