"""Copy a folder between object storage and a disk, whole or with an error: ``python transfer.py SOURCE TARGET``.

Both are URIs (``s3://bucket/folder``, ``file:///folder``) or absolute paths.  Pods run it before the program that reads what
it copied; one that finds nothing ends with status 1, and Kubernetes tries again.
"""

from __future__ import annotations

import sys

from pyarrow import fs


def transfer(source: str, target: str) -> int:
    """Copy all files under ``source`` to ``target``; returns how many there are."""
    here, folder = fs.FileSystem.from_uri(source)
    there, place = fs.FileSystem.from_uri(target)
    files = [f for f in here.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True)) if f.is_file]
    if not files:
        sys.exit(f"transfer: {source} holds no files; is the stage before this one done, and the address right?")
    if isinstance(there, fs.LocalFileSystem):  # object stores have no folders to make
        for parent in sorted({f.path[len(folder) :].rpartition("/")[0] for f in files}):
            there.create_dir(place + parent, recursive=True)
    fs.copy_files(folder, place, source_filesystem=here, destination_filesystem=there)
    copied = [f for f in there.get_file_info(fs.FileSelector(place, recursive=True)) if f.is_file]
    sizes = {f.path[len(place) :].strip("/"): f.size for f in copied}
    missing = [f.path for f in files if sizes.get(f.path[len(folder) :].strip("/")) != f.size]
    if missing:
        sys.exit(f"transfer: {missing[0]} and {len(missing) - 1} others did not arrive in {target}")
    return len(files)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python transfer.py SOURCE TARGET")
    print(f"copied {transfer(sys.argv[1], sys.argv[2])} files from {sys.argv[1]} to {sys.argv[2]}")
