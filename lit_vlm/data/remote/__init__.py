"""Data from anywhere: files of the hub, of buckets and of the web, fetched whole into the cache folder."""

from lit_vlm.data.remote.address import SCHEMES, Address, is_address, parse_address
from lit_vlm.data.remote.cached import Fetched, fetch, origin_of, place_of, revision_of
from lit_vlm.data.remote.chosen import Chosen, choose, holds, store_of

__all__ = [
    "SCHEMES",
    "Address",
    "Chosen",
    "Fetched",
    "choose",
    "fetch",
    "holds",
    "is_address",
    "origin_of",
    "parse_address",
    "place_of",
    "revision_of",
    "store_of",
]
