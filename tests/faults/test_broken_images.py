"""Pictures that no one should have put into a data set: runs go on without them and say which they were."""

import io
import json
import random
import struct
import time
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from hf_simprune.data.decoding import DECODING_ERRORS, decode_image, image_size, open_image
from hf_simprune.dino.argument_parsing import parse_arguments
from hf_simprune.dino.run import run_training

from ..tiny_run import metrics, png, words


def picture(seed: int = 0, width: int = 20, height: int = 16) -> Image.Image:
    """Soft colours, that lossy formats keep."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def turned_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@cache
def bomb(pixels: float) -> bytes:
    """A PNG of kilobytes with this many pixels, one bit each, put together without holding them."""
    side = int(pixels**0.5)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


LIMIT = Image.MAX_IMAGE_PIXELS
UNREADABLE = {
    "corrupt": lambda i: b"no picture at all" * 9,
    "truncated": lambda i: encoded(picture(i), "JPEG")[: 120 + i],
    "cut in its pixels": lambda i: png(i)[:-40],
    "zero bytes": lambda i: b"",
    "a bomb beyond Pillow's error": lambda i: bomb(2.1 * LIMIT),
    "a bomb beyond Pillow's warning": lambda i: bomb(1.95 * LIMIT),
}
UNUSUAL = {
    "CMYK": lambda i: encoded(picture(i).convert("CMYK"), "JPEG"),
    "16-bit": lambda i: encoded(Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200)),
    "palette": lambda i: encoded(picture(i).quantize(32), transparency=3),
    "animated": lambda i: encoded(picture(i), "GIF", save_all=True, append_images=[picture(i + 1)] * 3),
    "turned by EXIF": lambda i: encoded(picture(i), "JPEG", exif=turned_exif()),
}
EACH = 3  # of 60: five per cent of every kind


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """60 pictures, 5 % of each kind; returns the file and the rows that cannot be read."""
    kinds = [*UNREADABLE, *UNUSUAL]
    places = random.Random(3).sample(range(60), EACH * len(kinds))
    images = [png(i) for i in range(60)]
    bad = []
    for number, place in enumerate(places):
        kind = kinds[number // EACH]
        images[place] = (UNREADABLE | UNUSUAL)[kind](place)
        bad += [place] if kind in UNREADABLE else []
    path = tmp_path_factory.mktemp("mixed") / "mixed.parquet"
    pq.write_table(pa.table({"image": images, "label": [i % 4 for i in range(60)]}), path)
    return str(path), sorted(bad)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"dataloader_num_workers": 2}, marks=pytest.mark.faults),
        pytest.param({"streaming": True}, marks=pytest.mark.faults),
    ],
    ids=["held in memory", "read by workers", "streamed"],
)
def test_a_run_over_damaged_pictures_goes_on_and_lists_them(mixed, options, tmp_path, monkeypatch, capsys, trials):
    data, bad = mixed
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("hf_simprune.dino.run.draw_pictures", lambda *_: None)
    if options:
        monkeypatch.setattr("hf_simprune.dino.run_data.decode_small_set", lambda *_: None)
    AcceleratorState._reset_state(True)
    folder = tmp_path / "run"
    run_training(parse_arguments(words(output_dir=folder, dataset_name_or_path=data, max_steps=8, **options)))

    listed = json.loads((folder / "training" / "run.json").read_text())["bad_images"]
    if "streaming" in options:  # its rows are numbered as they are read, and the second epoch has begun
        assert len(listed) >= len(bad)
    else:
        assert listed == bad
    steps = [record for record in metrics(folder) if "loss" in record]
    assert len(steps) == 8 and steps[-1]["bad_images"] == len(listed)
    line = f"{len(listed)} ({', '.join(map(str, listed[:20]))}"
    assert f"images that could not be read and were replaced: {line}" in capsys.readouterr().out
    assert line in (folder / "README.md").read_text()
    trials(f"damaged pictures in a run ({options or 'held in memory'}), {len(listed)} of them unreadable", 33)


def peak() -> int:
    """Most bytes this process held at once."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def peak_from_now() -> int:
    """As `peak`, after forgetting what was before."""
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        pytest.skip("this system does not tell how much memory was in use at most")
    forget.write_text("5")
    return peak()


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_refused_before_its_pixels_fill_the_memory(kind):
    data = UNREADABLE[kind](1)
    before = peak_from_now()
    started = time.process_time()
    with pytest.raises(DECODING_ERRORS):
        decode_image(data)
    assert time.process_time() - started < 2
    assert peak() - before < 50e6


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_is_only_unusual_is_read_upright_as_its_first_frame(kind):
    pixels = decode_image(UNUSUAL[kind](5)).numpy().astype(int)
    expected = np.asarray(picture(5)).astype(int)
    if kind == "turned by EXIF":
        expected = np.rot90(expected, -1)
    assert pixels.shape == expected.shape
    if kind == "16-bit":
        expected = np.repeat(np.arange(320).reshape(16, 20, 1) * 200 // 256, 3, axis=2)
    assert np.abs(pixels - expected).mean() < (0.1 if kind == "16-bit" else 15)


def test_pillows_limit_is_an_error_from_its_first_pixel_on(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 320)
    assert decode_image(encoded(picture(0, 20, 16))).shape == (16, 20, 3)
    for read in (decode_image, image_size, open_image):
        with pytest.raises(Image.DecompressionBombError, match="21 x 16 pixels are more than"):
            read(encoded(picture(0, 21, 16)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # who trusts their pictures may say so
    assert decode_image(encoded(picture(0, 21, 16))).shape == (16, 21, 3)


def sources() -> list[bytes]:
    """Small pictures in every format and mode that Pillow writes here."""
    image, found = picture(0), []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM", "TGA", "PCX", "DDS", "JPEG2000", "AVIF"):
        for mode in ("RGB", "L", "P", "CMYK", "1", "I;16", "RGBA", "F"):
            try:
                found.append(
                    encoded(image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode), kind)
                )
            except (OSError, ValueError, KeyError):
                continue  # this format has no such mode, or this Pillow no such format
    return [*found, UNUSUAL["animated"](0), UNUSUAL["turned by EXIF"](0)]


def damaged(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        # headers are short and matter most
        place = chance.randrange(min(len(changed), chance.choice((40, 200, 10**6))) or 1)
        change = chance.random()
        if change < 0.5:
            changed[place : place + 1] = bytes([chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))])
        elif change < 0.6:
            del changed[place:]
        elif change < 0.75:
            del changed[place : place + chance.randrange(1, 9)]
        elif change < 0.9:
            changed[place:place] = chance.randbytes(chance.randrange(1, 9))
        else:
            changed[place : place + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")  # Pillow says much about such files
@pytest.mark.parametrize("count", [400, pytest.param(8000, marks=pytest.mark.faults)])
def test_damaged_files_of_every_format_are_read_or_refused_as_unreadable(count, trials):
    chance, originals = random.Random(count), sources()
    assert len(originals) > 40
    readable = 0
    for trial in range(count):
        data = damaged(chance.choice(originals), chance)
        started = time.process_time()
        try:
            pixels = decode_image(data)
        except DECODING_ERRORS:
            pass
        except Exception as error:
            pytest.fail(f"trial {trial} of seed {count}: {type(error).__name__}: {error}")
        else:
            readable += 1
            assert pixels.ndim == 3 and pixels.shape[2] == 3 and min(pixels.shape) > 0
        assert time.process_time() - started < 5, trial
    assert 0 < readable < count
    trials(f"mutated picture files, {readable} of them still readable", count)
