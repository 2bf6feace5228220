"""The demo's text: English to start from and domains to adapt to, all of it already on the machine.

A domain is bytes; the model reads bytes, so that no tokenizer is needed. The last tenth of each text is held out.
Which domains exist depends on how Python was installed (Debian ships it without idlelib, so without its HTML): a
candidate with too little text gives its place to the next one, and `choose` says so.
"""

import html.entities
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

LEAST_BYTES = 50_000  # with less than this, the adapter learns the text by heart
MOST_BYTES = 400_000

_STDLIB = Path(sysconfig.get_path("stdlib"))
_SITE_PACKAGES = Path(torch.__file__).parent.parent


@dataclass(frozen=True)
class Text:
    name: str
    origin: str  # in words
    data: bytes

    @cached_property
    def _bytes(self) -> Tensor:
        return torch.frombuffer(bytearray(self.data), dtype=torch.uint8)

    @property
    def train(self) -> Tensor:
        return self._bytes[: -(len(self.data) // 10)]

    @property
    def held_out(self) -> Tensor:
        return self._bytes[-(len(self.data) // 10) :]


def english() -> Text:
    """The language reference that `help()` prints, without which there is nothing to start from."""
    from pydoc_data.topics import topics

    return Text("English", "pydoc_data.topics", "\n".join(topics.values()).encode()[: 2 * MOST_BYTES])


def choose(count: int) -> tuple[list[Text], list[str]]:
    """The first `count` domains that this machine has, and a sentence for each one that it lacks."""
    texts, missing = [], []
    for name, origin, gather in CANDIDATES:
        data = gather()
        if len(data) >= LEAST_BYTES:
            texts.append(Text(name, origin, data))
        else:
            missing.append(f"this machine has no {name} to speak of ({len(data)} bytes in {origin})")
        if len(texts) == count:
            return texts, [f"{line}: {texts[-1].name} takes its place" for line in missing]
    raise RuntimeError(f"the demo needs {count} domains with {LEAST_BYTES} bytes of text; {'; '.join(missing)}")


def _read(paths: Iterable[Path]) -> bytes:
    """The files one after another, each once, up to MOST_BYTES."""
    seen, text = set(), bytearray()
    for path in paths:
        real = path.resolve()
        if len(text) >= MOST_BYTES:
            break
        if real.is_file() and real not in seen:
            seen.add(real)
            text += real.read_bytes() + b"\n"
    return bytes(text[:MOST_BYTES])


def _python() -> bytes:
    return _read(sorted(_STDLIB.glob("*.py")))


def _headers() -> bytes:
    folders = (Path(sysconfig.get_path("include")), Path("/usr/include"), _SITE_PACKAGES / "torch" / "include")
    return _read(path for folder in folders for path in sorted(folder.glob("*.h")))


def _html() -> bytes:
    return _read(sorted(_STDLIB.glob("*/*.html")))


def _licences() -> bytes:
    packages = sorted(_SITE_PACKAGES.glob("*.dist-info/**/LICEN*"))
    return _read([*sorted(Path("/usr/share/common-licenses").glob("*")), _STDLIB / "LICENSE.txt", *packages])


def _tables() -> bytes:
    return _read([Path(html.entities.__file__), *sorted(_STDLIB.glob("encodings/[cmk]*.py"))])


CANDIDATES: tuple[tuple[str, str, Callable[[], bytes]], ...] = (
    ("Python", "the standard library's modules", _python),
    ("C headers", "Python's, the system's or torch's headers", _headers),
    ("HTML", "the pages of the standard library", _html),
    ("licences", "the system's and the packages' licence texts", _licences),
    ("code tables", "the standard library's character tables", _tables),
)
