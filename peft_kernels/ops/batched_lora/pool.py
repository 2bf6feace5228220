"""AdapterPool: many adapters of one model in memory, each ready for any row of any batch; `batched_lora_` reads it.

Writers (add, remove, the end of a pin) hold a lock. Readers hold none, and never see half an adapter:
  - A slot that a name stands for, or that is pinned, is never written. add() fills a slot that nobody knows, its rank
    last in every table, and only then publishes the name, by putting a new dict in place of the old one.
  - remove() and replace take the name away first. The slot is freed when no pin holds it: rank 0 in every table, then
    its pages go back. Whoever still uses its number without a pin gets nothing added, or a later adapter, or (where
    tables() is from before that adapter made the pool grow) a refusal.
  - A tensor that grows is replaced by a larger copy before the name of the adapter that needed it is published. So take
    ids first and tables() after: the tables then know every slot of the ids.
On a GPU all of this is ordered by the stream that is current: add and run on the same one, or wait_for_writes() before
running on another. What has grown stays as it was beside the larger copy there: a captured graph may still read it.
"""

import difflib
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.ops.batched_lora.entries import FLOATS, MAX_POOL_RANK, SiteAdapter, Stored, check, store
from peft_kernels.ops.batched_lora.entries import require as _require
from peft_kernels.ops.batched_lora.pages import PageStore, SiteTable
from peft_kernels.ops.batched_lora.pooled_reference import PAGE

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NAMED = 8  # of the adapters that are there, in a message
_FEATURES = {  # parts of a tensor's name that are no site's, and what about them
    "lora_magnitude_vector": "DoRA's magnitude is not a site: it goes into the gain of its site's SiteAdapter",
    "lora_embedding_": "lora_embedding_A and _B are not sites: they are lora_A and lora_B of their site's SiteAdapter",
    "modules_to_save": "modules_to_save is not supported",
}


@dataclass(frozen=True)
class Site:
    """A place of the model that adapters may touch: a linear layer from K to N features.

    Example:
        >>> site = peft_kernels.Site(K=64, N=32)
    """

    K: int
    N: int


class Tables(NamedTuple):
    """What `batched_lora_` takes for one slice."""

    pages_in: Tensor  # [P, 8, K]
    pages_out: Tensor  # [P', 8, N]
    table: Tensor  # int32 [slots, 4 + 2 T]
    scaling: Tensor  # [slots]
    down_bias: Tensor  # [slots, 8 T], or [0]


class AdapterPool:
    """Adapters of one model, with true ranks, added, replaced and removed while batches run.

    Args:
        sites: `Site(K, N)` of every place that an adapter may touch, by name.
        adapters: the most names at a time. There is one slot more, so that a full pool can still replace.
        dtype: what factors are stored in: that of the activations, or float32.
        device: where they are stored.
        max_rank: larger ranks are refused; those of LoRA and widths of bottleneck adapters are ranks.

    An adapter takes `ceil(r / 8)` pages of 8 rows for each factor that it has (a bias and a gain are one more row of
    lora_B each), and nothing at sites that it does not touch. Pages are shared by all sites of one width and doubled
    when they run out: an allocation and a copy, counted by `growths`. A captured CUDA graph holds addresses from
    before, so it must be captured again when `growths` has changed, and growing inside a capture raises. Safe for any
    number of threads.

    Raises:
        ValueError, TypeError: sites, adapters, dtype or max_rank that make no pool.

    Example:
        >>> pool = peft_kernels.AdapterPool({"q_proj": peft_kernels.Site(64, 32)}, adapters=8)
        >>> slot = pool.add("alice", {"q_proj": (torch.randn(4, 64), torch.randn(32, 4), 2.0, None)})
        >>> pool.ids(["alice", None, "alice"]).tolist()
        [0, -1, 0]
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        adapters: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_rank: int = MAX_POOL_RANK,
    ):
        _require(len(sites) >= 1, "sites must name at least one site, got none")
        for name, site in sites.items():
            _require(site.K >= 1 and site.N >= 1, f"site '{name}' must have K and N of 1 or more, got {site}")
        _require(adapters >= 1, f"adapters must be 1 or more, got {adapters}")
        _require(max_rank >= 1, f"max_rank must be 1 or more, got {max_rank}")
        _require(dtype in FLOATS, f"dtype must be float32, float16, bfloat16 or float64, got {dtype}", TypeError)
        self.sites, self.adapters, self.max_rank = dict(sites), adapters, max_rank
        self.slots = adapters + 1  # what `batched_lora_route` takes as `adapters`
        self.dtype, self.device = dtype, torch.device(device)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        widths = {width for site in sites.values() for width in (site.K, site.N)}
        with torch.inference_mode(False):
            self._stores = {width: PageStore(width, dtype, self.device) for width in widths}
            self._tables = {name: SiteTable(self.slots, wide, self.device) for name in sites}
        self._lock = threading.RLock()
        self._slot_of: dict[str, int] = {}  # replaced, never changed
        self._free = list(range(self.slots))
        self._held: dict[int, list[tuple[str, int, list[int]]]] = {}  # site, width and pages, by slot
        self._pins: Counter[int] = Counter()
        self._written: torch.cuda.Event | None = None

    # -- readers --

    def __len__(self) -> int:
        return len(self._slot_of)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} of at most {self.adapters}, {len(self.sites)} site"
            f"{'s' * (len(self.sites) != 1)}, {self.dtype} on {self.device}, {self.nbytes / 1e6:.1f} MB)"
        )

    def names(self) -> list[str]:
        """The adapters that are there, in the order in which they came."""
        return list(self._slot_of)

    def slot(self, name: str) -> int:
        """The slot of an adapter's present version. Raises KeyError if there is no such adapter."""
        return _slot(self._slot_of, name)

    def ids(self, names: Iterable[str | None]) -> Tensor:
        """The slot of each row's adapter, -1 for None: int32, on the pool's device. Raises KeyError as slot()."""
        slot_of = self._slot_of  # one state of the pool for the whole batch
        slots = [-1 if name is None else _slot(slot_of, name) for name in names]
        return torch.tensor(slots, dtype=torch.int32, device=self.device)

    def tables(self, site: str) -> Tables:
        """What `batched_lora_` takes for one site. Take the ids first. Raises KeyError if there is no such site."""
        if site not in self.sites:
            raise KeyError(f"AdapterPool: no site '{site}' in this pool{_nearest(site, self.sites)}")
        where = self.sites[site]
        return Tables(self._stores[where.K].pages, self._stores[where.N].pages, *self._tables[site].tensors)

    def touched(self, site: str) -> bool:
        """Whether some adapter has ever touched a site, or room was reserved there; False: its op may be left out."""
        return self._tables[site].touched

    def wait_for_writes(self) -> None:
        """Lets the stream that is current on a GPU wait for what was added, where that was done in another stream."""
        if self._written is not None:
            self._written.wait()

    @property
    def pinned(self) -> int:
        """How many pins hold a version of an adapter."""
        return sum(self._pins.values())

    @property
    def growths(self) -> int:
        """How often a tensor of tables() was replaced by a larger one, or a site touched for the first time."""
        return sum(part.growths for part in (*self._stores.values(), *self._tables.values()))

    @property
    def nbytes(self) -> int:
        """Bytes allocated: pages, free ones included, tables and scalings."""
        tables = sum(tensor.nbytes for table in self._tables.values() for tensor in table.tensors)
        return tables + sum(store.pages.nbytes for store in self._stores.values())

    # -- writers --

    def add(self, name: str, tensors: Mapping[str, tuple], replace: bool = False, allow_nonfinite: bool = False) -> int:
        """Adds an adapter and returns its slot; all of it, or nothing where anything is refused.

        Args:
            name: letters, digits, `_`, `-` and `.`, from 1 to 64 of them, beginning with a letter or digit, no `..`.
            tensors: by site, a `SiteAdapter`, of LoRA or of a bottleneck adapter, or a tuple of its first four or five:
                `(lora_A [r, K], lora_B [N, r], scaling, lora_bias [N] or None, gain [N] or None)`.
            replace: a new version of an adapter that is there. It gets a slot of its own; requests that pinned the old
                one keep it.
            allow_nonfinite: take infinities and NaN, which then stay in the rows of this adapter.

        Raises:
            ValueError, TypeError: naming the site, the tensor and the rule; or the name is taken.
            RuntimeError: the pool is full.
        """
        with self._writing():
            _check_name(name)
            before = self._slot_of.get(name)
            _require(before is None or replace, f"there is an adapter '{name}'; replace=True makes a new version of it")
            entries = [self._entry(site, entry, allow_nonfinite) for site, entry in tensors.items()]
            _require(len(entries) >= 1, f"adapter '{name}' must touch at least one site, got none")
            full = len(self._slot_of) >= self.adapters and before is None
            _require(not full, f"full: it has {len(self)} of at most {self.adapters}; remove one first", RuntimeError)
            pinned = "full: every free slot holds an old version that is still pinned"
            _require(bool(self._free), pinned, RuntimeError)
            slot = self._free.pop(0)
            self._held[slot] = []
            try:
                self._fill(slot, entries)
            except BaseException:
                self._release(slot)
                raise
            self._slot_of = self._slot_of | {name: slot}
            if before is not None and not self._pins[before]:
                self._release(before)
            return slot

    def remove(self, name: str) -> None:
        """Takes an adapter away; what pinned it keeps it until its pin goes. Raises KeyError as slot()."""
        with self._writing():
            slot = self.slot(name)
            self._slot_of = {n: s for n, s in self._slot_of.items() if n != name}
            if not self._pins[slot]:
                self._release(slot)

    def reserve(self, adapters: int, rank: int, sites: Iterable[str] | None = None, *, down_bias: bool = False) -> None:
        """Makes room for so many adapters of a rank in all, so that adding them replaces no tensor (`growths`).

        Args:
            adapters: how many; one more than there are names at a time lets a full pool replace.
            rank: of each, and one more for a lora_bias, one more for a gain.
            sites: that they touch: if not given, those that the adapters touch that are there.
            down_bias: for adapters that have one.

        Raises:
            KeyError: there is no such site.
            ValueError: adapters or rank are below 1, or the rank is above max_rank by more than the two.
        """
        _require(adapters >= 1, f"adapters must be 1 or more, got {adapters}")
        _require(1 <= rank <= self.max_rank + 2, f"rank must be from 1 to {self.max_rank + 2}, got {rank}")
        with self._writing():
            if sites is None:
                sites = {site for held in self._held.values() for site, _, _ in held}
            pages = Counter()
            for name in sites:
                self.tables(name)  # raises where there is none
                self._tables[name].reserve(rank, down_bias)
                for width in (self.sites[name].K, self.sites[name].N):
                    pages[width] += adapters * -(-rank // PAGE)
            for width, count in pages.items():
                self._stores[width].reserve(count)

    @contextmanager
    def pin(self, name: str) -> Iterator[int]:
        """Gives the slot of an adapter's present version and keeps it as it is until the block ends."""
        with self._lock:
            slot = self.slot(name)
            self._pins[slot] += 1
        try:
            yield slot
        finally:
            with self._writing():
                self._pins[slot] -= 1
                if not self._pins[slot] and slot not in self._slot_of.values():
                    self._release(slot)

    # -- parts of the writers; the lock is held --

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The lock; and what is made or changed inside inference mode can be changed outside of it too."""
        with self._lock, torch.inference_mode(False):
            yield
            if self.device.type == "cuda":
                self._written = torch.cuda.current_stream(self.device).record_event()

    def _fill(self, slot: int, entries: list[Stored]) -> None:
        """Factors into pages and rows of tables that nobody reads; what is taken is held from then on."""
        pages = []
        for entry in entries:
            site = self.sites[entry.site]
            self._tables[entry.site].reserve(entry.rank, entry.down_bias is not None)
            for width, rows in ((site.K, entry.a), (site.N, entry.b)):
                pages.append(self._stores[width].take(len(rows)))
                self._held[slot].append((entry.site, width, pages[-1]))
                self._stores[width].write(pages[-1], rows)
        for entry, a, b in zip(entries, pages[::2], pages[1::2], strict=True):
            self._tables[entry.site].publish(slot, entry, a, b)

    def _release(self, slot: int) -> None:
        """Withdraws a slot from every table, then gives its pages back; it is taken again as late as possible."""
        held = self._held.pop(slot)
        for site, _, _ in held:
            self._tables[site].withdraw(slot)
        for _, width, numbers in held:
            self._stores[width].give_back(numbers)
        self._free.append(slot)

    def _entry(self, site: str, entry: SiteAdapter | tuple, allow_nonfinite: bool) -> Stored:
        for part, rule in _FEATURES.items():
            _require(part not in site, f"{rule}, got '{site}'")
        _require(site in self.sites, f"no site '{site}' in this model{_nearest(site, self.sites)}")
        checked = check(site, self.sites[site].K, self.sites[site].N, entry, self.max_rank)
        return store(site, checked, self.dtype, self.device, allow_nonfinite)


def _slot(slot_of: Mapping[str, int], name: str) -> int:
    try:
        return slot_of[name]
    except KeyError:
        near = _nearest(name, slot_of) if isinstance(name, str) else ""
        has = f"; it has {', '.join(map(repr, list(slot_of)[:_NAMED])) or 'none'}" + ", ..." * (len(slot_of) > _NAMED)
        raise KeyError(f"AdapterPool: no adapter {name!r} in this pool{near or has}") from None


def _check_name(name: str) -> None:
    _require(isinstance(name, str), f"a name must be a str, got {type(name).__name__}", TypeError)
    _require(name != "__base__", "the name '__base__' is reserved")
    _require(
        _NAME.fullmatch(name) is not None and ".." not in name,
        f"a name must have 1 to 64 letters, digits, '_', '-' or '.', begin with a letter or digit and have no '..', "
        f"got {name[:80]!r}",
    )


def _nearest(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
