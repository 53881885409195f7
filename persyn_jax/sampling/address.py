"""Where an endpoint is, and where its API key stands."""

import os
from urllib.parse import urlsplit

import httpx

from persyn_jax.config import ConfigError


def check_url(name: str, url: str) -> None:
    """Raises ConfigError unless `url`, of the argument `name`, is an address to send requests to.

    It has a scheme and a host, and neither a query nor a password.
    """
    try:
        httpx.URL(url)  # refuses some that the next line takes
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except (ValueError, httpx.InvalidURL):
        raise ConfigError(f"{name} {url!r}: not a URL") from None
    if not fine:
        raise ConfigError(f"{name} {url!r}: must begin with http:// or https:// and a host")
    if parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"{name}: must be an address alone; the key stands in --api-key-env")


def api_key(variable: str | None, whose: str = "") -> str | None:
    """The API key in the environment variable; None if none is named.

    whose: begins the message. Raises ConfigError, without the key: not set, not printable ASCII
    (an HTTP library's own message would show it).
    """
    if variable is None:
        return None
    where = f"{whose}environment variable {variable}"
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"{where} is not set")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{where} holds characters that no API key has")
    return key
