"""Signatures of the Standard Webhooks scheme, version 1: https://www.standardwebhooks.com"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

PREFIX = "whsec_"
LEAST, MOST = 24, 64
"""Bytes of a secret, as the scheme says."""


def key_of(secret: str) -> bytes:
    """The key in `whsec_BASE64`. Raises ValueError for anything else; its message does not have the secret."""
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith(PREFIX) or not LEAST <= len(key) <= MOST:
        raise ValueError(f"must be {PREFIX} and {LEAST} to {MOST} random bytes in base64")
    return key


def headers(key: bytes, id: str, timestamp: int, payload: bytes) -> dict[str, str]:
    """Of a message: id, time in seconds since 1970, and signature."""
    signed = b".".join((id.encode(), str(timestamp).encode(), payload))
    signature = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    return {"webhook-id": id, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signature}"}
