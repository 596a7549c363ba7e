"""Fetch a headless Chromium from npm, unpack it into a folder and print where it is: `fetch_chromium.py FOLDER`."""

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import brotli  # comes with gradio


PACKAGE = "@sparticuz/chromium@147"
EXECUTABLE = "chrome"


def fetch(folder: Path) -> Path:
    """The executable in `folder`, which is filled once."""
    target = folder / EXECUTABLE
    if target.exists():
        return target
    if shutil.which("npm") is None:
        raise SystemExit("npm is needed to fetch a browser; or name one of your own in HF_SIMPRUNE_CHROMIUM")
    folder.mkdir(parents=True, exist_ok=True)
    name = subprocess.run(
        ["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    with tarfile.open(folder / name) as package:
        packed = {
            Path(member.name).name: package.extractfile(member).read()
            for member in package
            if member.name.endswith(".br")
        }
    (folder / name).unlink()
    for part in ("fonts", "swiftshader"):
        tarfile.open(fileobj=io.BytesIO(brotli.decompress(packed[f"{part}.tar.br"]))).extractall(folder, filter="data")
    partial = target.with_suffix(".part")
    partial.write_bytes(brotli.decompress(packed["chromium.br"]))
    partial.chmod(0o755)
    return partial.replace(target)


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1]).absolute()))
