"""Stands for a command in the newcomer's PATH: hands its words to the one process that has everything imported.

Started with `python -S -E`, so that it takes hundredths of a second.
"""

import json
import os
import socket
import sys


def main() -> int:
    address, seconds, name, *words = sys.argv[1:]
    if name == "python" and words[:1] == ["-c"]:
        os.execv(os.environ["NEWCOMER_PYTHON"], [os.environ["NEWCOMER_PYTHON"], *words])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        request = {"words": [name, *words], "folder": os.getcwd()}
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile() as stream:
            answer = json.loads(stream.readline())
    with open(seconds, "a") as file:
        file.write(f"{answer['seconds']}\n")
    sys.stdout.write(answer["out"])
    sys.stderr.write(answer["err"])
    return answer["status"]


if __name__ == "__main__":
    sys.exit(main())
