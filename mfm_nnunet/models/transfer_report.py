"""The report about a weight transfer: what was loaded, adapted, new and ignored, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Entry:
    """One tensor of a report; ``how`` says how it was adapted, or why it is new or ignored."""

    name: str
    num_parameters: int
    how: str = ""


@dataclass(frozen=True)
class TransferReport:
    """What happened to every tensor: the target's are loaded, adapted or new, the source's unused ones are ignored.

    ``encoder_share`` is the share (0 to 1) of the target encoder's parameters that were loaded or adapted.
    """

    loaded: tuple[Entry, ...]
    adapted: tuple[Entry, ...]
    new: tuple[Entry, ...]
    ignored: tuple[Entry, ...]
    encoder_share: float
    warning: str = ""
    """What is likely to be a mistake though most parameters match."""

    def summary(self) -> str:
        """A small table: tensors and parameters per kind, the encoder's share, and what was adapted."""
        lines = [f"{'weights':<10}{'tensors':>8}{'parameters':>14}"]
        for kind, entries in self._kinds():
            lines.append(f"{kind:<10}{len(entries):>8}{sum(entry.num_parameters for entry in entries):>14,}")
        lines.append(f"{self.encoder_share:.1%} of the encoder's parameters come from the checkpoint")
        lines += [f"adapted {entry.name}: {entry.how}" for entry in self.adapted]
        return "\n".join([*lines, self.warning] if self.warning else lines)

    def details(self) -> str:
        """Every tensor by name, one line each."""
        lines = []
        for kind, entries in self._kinds():
            for entry in entries:
                how = f"  ({entry.how})" if entry.how else ""
                lines.append(f"{kind:<8} {entry.name}  {entry.num_parameters:,}{how}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """The report as plain JSON values."""
        return {**{kind: [asdict(e) for e in es] for kind, es in self._kinds()}, "encoder_share": self.encoder_share}

    def _kinds(self) -> Iterator[tuple[str, tuple[Entry, ...]]]:
        yield from (("loaded", self.loaded), ("adapted", self.adapted), ("new", self.new), ("ignored", self.ignored))
