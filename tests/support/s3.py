"""An S3 server of a test's own (moto, in a thread), on a port that the system gives."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from preprocessing.running import storage as places

BUCKET = "bucket"


class S3:
    """A running server with one bucket. `environment`: what a process needs to reach it."""

    def __init__(self, port: int) -> None:
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.files = fs.S3FileSystem(
            endpoint_override=self.environment["AWS_ENDPOINT_URL"],
            access_key="test",
            secret_key="test",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        self.files.create_dir(BUCKET)

    def put(self, folder: Path, name: str) -> None:
        """Copy a local folder to s3://bucket/name."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with self.files.open_output_stream(f"{BUCKET}/{name}/{path.relative_to(folder)}") as stream:
                    stream.write(path.read_bytes())

    def names(self, name: str) -> list[str]:
        """Sorted names of all objects below s3://bucket/name."""
        found = self.files.get_file_info(fs.FileSelector(f"{BUCKET}/{name}", recursive=True, allow_not_found=True))
        return sorted(info.path[len(f"{BUCKET}/{name}/") :] for info in found if info.type == fs.FileType.File)

    def read(self, name: str) -> bytes:
        """The bytes of s3://bucket/name."""
        with self.files.open_input_file(f"{BUCKET}/{name}") as file:
            return bytes(file.read())


@contextmanager
def s3_server() -> Iterator[S3]:
    """Run a server for the length of the block, in which s3:// is its."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        found = S3(server.get_host_and_port()[1])
        with pytest.MonkeyPatch.context() as patch:
            for name, value in found.environment.items():
                patch.setenv(name, value)
            places._filesystem.cache_clear()
            yield found
    finally:
        places._filesystem.cache_clear()
        server.stop()
