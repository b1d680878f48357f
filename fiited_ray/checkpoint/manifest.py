"""What a checkpoint says of itself: `manifest.json` for the run, `part-00000.json` ... for each worker's shard.

Both are JSON objects of two keys: `sha256`, of the canonical text of what stands under `content`, and `content`, which follows a schema.
Neither is believed before its checksum, its schema and its version fit, and no size that it declares leads to memory being taken.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import jsonschema
import jsonschema.validators

FORMAT = "fiited-ray-checkpoint"
VERSION = 4
MANIFEST = "manifest.json"
_LONGEST_TEXT = 16 << 20  # bytes of a manifest or part

_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**62}
_SEEN = {"type": "integer", "minimum": -(2**62), "maximum": 2**62}
_ID = {"type": "string", "pattern": r"\A[0-9a-f]{32}\Z"}
_SHA256 = {"type": "string", "pattern": r"\A[0-9a-f]{64}\Z"}
_FILE_NAME = {"type": "string", "pattern": r"\A[a-z][a-z0-9_-]{0,60}\.(safetensors|yaml)\Z"}
_FOLDER_NAME = {"type": "string", "pattern": r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}\Z"}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _array(items: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_FILE = _object({"name": _FILE_NAME, "bytes": _COUNT, "sha256": _SHA256})
_ROWS_FILE = _object(_FILE["properties"] | {"first_bucket": _COUNT, "end_bucket": _COUNT, "rows": _COUNT})

MANIFEST_SCHEMA = _object(
    {
        "format": {"const": FORMAT},
        "version": {"const": VERSION},
        "id": _ID,  # of this checkpoint; its parts repeat it
        "run": {"type": "string", "maxLength": 200},  # that wrote it
        "step": _COUNT,
        "finished": {"type": "boolean"},  # training was over
        "workers": {"type": "integer", "minimum": 1, "maximum": 1024},
        "base": {"anyOf": [{"type": "null"}, _object({"folder": _FOLDER_NAME, "id": _ID})]},  # null: all rows are here
        "files": _array(_FILE, 1, 16),
        "data": {
            "anyOf": [{"type": "null"}, _object({"rows": _array(_COUNT, 1, 10**6), "text_ids": _array({"type": "string"}, 0, 10**5)})]
        },
        "training": _object(
            {
                "epoch": _COUNT,
                "batch": _COUNT,  # global batches of that epoch already learned from
                "samples": _COUNT,
                "seconds": {"type": "number", "minimum": 0},
                "threshold": {"type": "number", "minimum": 0},
                "gap": _COUNT,
                "last_round": _COUNT,
                "rounds": _COUNT,
                "totals": {"anyOf": [{"type": "null"}, _array(_COUNT, 3, 3)]},
                "window": _object({"seconds": {"type": "number", "minimum": 0}, "samples": _COUNT}),
                "last_lookups": _array(_COUNT, 2, 2),  # lookups and hits at the last report
                "skipped_steps": _array(_COUNT, 2, 2),  # in all, and of late in a row
            }
        ),
    }
)

PART_SCHEMA = _object(
    {
        "id": _ID,
        "rank": _COUNT,
        "first_bucket": _COUNT,
        "end_bucket": _COUNT,
        "threshold": {"type": "number", "minimum": 0},
        "state": _array(_SEEN, 11, 11),  # of the shard, see cuda_ext/cpu/shard.h
        "rows_by_width": _array(_COUNT, 1, 64),  # rows the shard held
        "peak_bytes": _COUNT,
        "bytes_sent": _COUNT,
        "shard": _FILE,
        "rows": _array(_ROWS_FILE, 0, 1024),
    }
)

# JSON Schema takes 1.0 for an integer; here it is none
_strict = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda checker, value: type(value) is int)
_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=_strict)
_VALIDATORS = {id(schema): _Validator(schema) for schema in (MANIFEST_SCHEMA, PART_SCHEMA)}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written; the message names the file."""


class IncompleteError(CheckpointError):
    """A checkpoint whose manifest or part is missing: it was not written to its end."""


@dataclass(frozen=True)
class FileFacts:
    """A file as a manifest names it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class RowsFile(FileFacts):
    """A file of rows whose keys belong to virtual buckets [first_bucket, end_bucket)."""

    first_bucket: int
    end_bucket: int
    rows: int


def part_name(rank: int) -> str:
    return f"part-{rank:05d}.json"


def encode(content: dict[str, Any]) -> bytes:
    """The JSON text of a manifest or part, with its checksum."""
    return json.dumps({"sha256": _checksum(content), "content": content}, indent=1, allow_nan=False).encode()


def decode(text: bytes, schema: dict[str, Any], where: str) -> dict[str, Any]:
    """Read a manifest or part.

    Args:
        where: the file's name, for messages.

    Raises:
        CheckpointError: for anything but an unharmed text of this version.
    """
    if len(text) > _LONGEST_TEXT:
        raise CheckpointError(f"{where}: {len(text)} bytes; no manifest is longer than {_LONGEST_TEXT}")
    try:
        sealed = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from None
    if not isinstance(sealed, dict) or sealed.keys() != {"sha256", "content"} or not isinstance(sealed["content"], dict):
        raise CheckpointError(f"{where}: not written by fiited-ray: its keys must be sha256 and content")
    content: dict[str, Any] = sealed["content"]
    if content.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{where}: format {str(content['format'])[:60]!r} is not {FORMAT}")
    if content.get("version", VERSION) != VERSION:
        raise CheckpointError(f"{where}: version {str(content['version'])[:60]} is unknown; this release reads version {VERSION}")
    try:
        intact = _checksum(content) == sealed["sha256"]
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{where}: its checksum differs from its content; the file is damaged")
    wrong = next(iter(_VALIDATORS[id(schema)].iter_errors(content)), None)
    if wrong is not None:
        raise CheckpointError(f"{where}: {'.'.join(map(str, wrong.absolute_path)) or 'content'}: {wrong.message[:200]}")
    return content


def _checksum(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
