"""The launcher's key-value store, and processes as a launcher starts them."""

from __future__ import annotations

from ifd_trainer.scoring.processes import Process


class Store:
    """The launcher's store, without a launcher; it outlives processes."""

    def __init__(self, **values: object) -> None:
        self.values = {name.replace("_", " "): str(value) for name, value in values.items()}

    def add(self, key: str, value: int) -> int:
        self.values[key] = str(int(self.values.get(key, 0)) + value)
        return int(self.values[key])

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def wait(self, keys: list[str], _: object) -> None:
        assert self.check(keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        if self.values.get(key, "") == expected:
            self.values[key] = value
        return self.values.get(key, "").encode()


def start(rank: int, world_size: int, store: Store) -> Process:
    """A process as its launcher starts it, for the first time or again."""
    return Process(rank, rank, world_size, store, store.add(f"life {rank}", 1))
