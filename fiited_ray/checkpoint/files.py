"""Files of a checkpoint on any pyarrow filesystem, with their checksums.

Tensors are written as safetensors, straight from their memory; they are read through a memory map, so that a file is never in memory twice.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs
import safetensors
import torch
from torch import Tensor

from fiited_ray.checkpoint.manifest import CheckpointError, FileFacts, IncompleteError

_BLOCK = 1 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Folder:
    """A folder on a filesystem."""

    filesystem: pyarrow.fs.FileSystem
    path: str

    @staticmethod
    def of(location: str | Path) -> Folder:
        """A local path, or an address such as s3://bucket/runs, also of a filesystem that fsspec knows.

        Raises:
            CheckpointError: for an address that no filesystem takes.
        """
        text = str(location)
        if "://" not in text:
            return Folder(pyarrow.fs.LocalFileSystem(), str(Path(text).absolute()))
        try:
            return Folder(*pyarrow.fs.FileSystem.from_uri(text))
        except (pa.ArrowInvalid, OSError) as error:
            raise CheckpointError(f"{text}: no filesystem takes this address: {error}") from None

    def child(self, name: str) -> Folder:
        return Folder(self.filesystem, f"{self.path}/{name}")

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        return Folder(self.filesystem, self.path.rstrip("/").rpartition("/")[0])

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)

    def make(self) -> None:
        """Make the folder and those above it.

        Raises:
            CheckpointError: when that is not possible.
        """
        try:
            self.filesystem.create_dir(self.path, recursive=True)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be made: {error}") from error

    def folders(self) -> list[Folder]:
        """Folders in this one; none where there is no such folder.

        Raises:
            CheckpointError: when it cannot be read.
        """
        try:
            found = self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.path, allow_not_found=True))
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error
        return [self.child(each.base_name) for each in found if each.type == pyarrow.fs.FileType.Directory]

    def delete(self) -> None:
        """Delete the folder and all that is in it.

        Raises:
            CheckpointError: when that is not possible.
        """
        try:
            self.filesystem.delete_dir(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be deleted: {error}") from error

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none.

        Raises:
            CheckpointError: for a link, which could lead anywhere.
        """
        if self.is_local and Path(self.path, name).is_symlink():
            raise CheckpointError(f"{self.path}/{name}: a link; checkpoints hold their files themselves")
        info = self.filesystem.get_file_info(f"{self.path}/{name}")
        return info.size if info.type == pyarrow.fs.FileType.File else None

    def read(self, name: str, most: int) -> bytes:
        """A small file.

        Raises:
            IncompleteError: when it is missing.
            CheckpointError: when it is longer than `most`, or unreadable.
        """
        where = f"{self.path}/{name}"
        size = self.size(name)
        if size is None:
            raise IncompleteError(f"{where}: missing; {self.path} is not a complete checkpoint")
        if size > most:
            raise CheckpointError(f"{where}: {size} bytes, more than the {most} that such a file can have")
        try:
            with self.filesystem.open_input_stream(where, compression=None) as stream:
                return stream.read()
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be read: {error}") from error

    def write(self, name: str, data: bytes) -> FileFacts:
        """Write a small file; on a local disk it is there as a whole or not at all, as it is on a store of objects.

        Raises:
            CheckpointError: when it cannot be written.
        """
        written = f".{name}" if self.is_local else name
        with self._written(written) as stream:
            stream.write(data)
        if written != name:
            Path(self.path, written).replace(Path(self.path, name))
        return FileFacts(name, len(data), hashlib.sha256(data).hexdigest())

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> FileFacts:
        """Write a safetensors file; no copy of the tensors is made.

        Raises:
            CheckpointError: when it cannot be written, on a full disk for instance.
        """
        header, at = {}, 0
        for key, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        digest, written = hashlib.sha256(), 0
        with self._written(name) as stream:
            blocks: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text, *map(_memory, tensors.values())]
            for block in blocks:
                digest.update(block)
                stream.write(block)
                written += len(block)
        return FileFacts(name, written, digest.hexdigest())

    @contextmanager
    def verified(self, facts: FileFacts) -> Iterator[Path]:
        """A local path to a file whose size and checksum are as they should be; a copy where the filesystem is not local.

        Raises:
            CheckpointError: naming the file, when it is missing or damaged.
        """
        where = f"{self.path}/{facts.name}"
        size = self.size(facts.name)
        if size is None:
            raise CheckpointError(f"{where}: missing")
        if size != facts.bytes:
            raise CheckpointError(f"{where}: {size} bytes, but the manifest says {facts.bytes}")
        with tempfile.NamedTemporaryFile(prefix="fiited-ray-") as copy:
            digest = hashlib.sha256()
            try:
                with self.filesystem.open_input_stream(where, compression=None) as stream:
                    while block := stream.read(_BLOCK):
                        digest.update(block)
                        if not self.is_local:
                            copy.write(block)
            except OSError as error:
                raise CheckpointError(f"{where}: cannot be read: {error}") from error
            if digest.hexdigest() != facts.sha256:
                raise CheckpointError(f"{where}: its checksum differs from the manifest's; the file is damaged")
            copy.flush()
            yield Path(self.path, facts.name) if self.is_local else Path(copy.name)

    @contextmanager
    def tensors(self, facts: FileFacts) -> Iterator[dict[str, Tensor]]:
        """The tensors of a verified file, mapped into memory: use them inside the context only.

        Raises:
            CheckpointError: naming the file, when it is missing, damaged or no safetensors file.
        """
        with self.verified(facts) as path:
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                raise CheckpointError(f"{self.path}/{facts.name}: not a safetensors file: {error}") from error
            yield found

    @contextmanager
    def _written(self, name: str) -> Iterator[IO[bytes]]:
        try:
            with self.filesystem.open_output_stream(f"{self.path}/{name}", compression=None) as stream:
                yield stream
        except OSError as error:
            raise CheckpointError(f"{self.path}/{name}: cannot be written: {error}") from error


def _memory(tensor: Tensor) -> memoryview:
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
