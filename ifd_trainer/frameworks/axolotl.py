"""Selection in axolotl: a plugin, whose options are the callback's own.

    plugins:
      - ifd_trainer.frameworks.axolotl.IFDSelectionPlugin
    ifd_selection:
      keep: 0.1

What axolotl counts in steps of the whole pool before it makes the trainer, the length of the run and of the warm-up,
is counted in the planned steps instead. Where a plugin cannot be imported axolotl prints that and trains without it,
so this module imports at its top what axolotl itself is made of, and nothing else.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import Trainer, TrainerCallback

# What selection cannot be exact with, by axolotl's option: why, and what to write instead.
_REFUSED = {
    "sample_packing": (
        "packs whole batches of rows anew in each epoch, so a number of rows is no number of steps",
        "sample_packing: false (group_by_length: true keeps padding low)",
    ),
    "use_pose": (
        "trains on positions that skip parts of the context, which scores know nothing of",
        "use_pose: false",
    ),
    "expert_parallel_size": (
        "lets processes wait for one another in each forward, but they score different numbers of batches",
        "expert_parallel_size: 1",
    ),
}
_WARMUP = 0.03  # axolotl's own, of all steps


class IFDSelectionArgs(BaseModel):
    """The keys that the plugin adds to axolotl's.

    Attributes:
        ifd_selection: options of `IFDSelectionCallback`, by their names; the callback checks them.
    """

    ifd_selection: dict[str, Any] | None = None


class IFDSelectionPlugin(BasePlugin):
    """Adds an `IFDSelectionCallback` to the trainer that axolotl makes.

    The options are words and numbers; `guard` may be a mapping of a `Guard`'s fields, such as {on_misaligned: warn}.
    Without `ifd_selection` in the configuration, the callback has its defaults: 10 % of the rows in each epoch.
    `num_epochs` are trained; `max_steps` ends a run where it is set. A warm-up that is a share (`warmup_ratio`, by
    default 0.03) is one of the planned steps.

    Raises:
        TypeError: for an option that the callback does not know, before rows are prepared.
        UserError: for values that it does not take, and for a configuration in which selection cannot be exact, when
            the trainer is made.
    """

    def register(self, cfg: dict) -> None:
        """Refuse unknown options before rows are prepared."""
        from ..training.later import SelectLater

        SelectLater(**_options(cfg))  # knows the names

    def get_input_args(self) -> str:
        """Where axolotl finds the keys."""
        return f"{__name__}.{IFDSelectionArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Trainer) -> list[TrainerCallback]:
        """The callback, made for this trainer."""
        from ..training.callback import IFDSelectionCallback

        _check(cfg)
        _count_planned_steps(cfg, trainer.args)
        return [IFDSelectionCallback(trainer, **_options(cfg))]


def _options(cfg: Any) -> dict[str, Any]:
    from ..errors import UserError
    from ..method.guard import Guard

    options = cfg.get("ifd_selection")
    if not (options is None or isinstance(options, dict)):
        raise UserError(
            f"ifd_selection holds options of the callback, as in `ifd_selection: {{keep: 0.1}}`, got {options!r}."
        )
    options = dict(options or {})
    if isinstance(options.get("guard"), dict):
        options["guard"] = Guard(**options["guard"])
    return options


def _check(cfg: Any) -> None:
    from ..errors import UserError

    for name, (why, instead) in _REFUSED.items():
        value = cfg.get(name)
        if value is True or (value or 0) > 1:
            shown = str(value).lower()
            raise UserError(f"{name}: {shown} {why}. Set {instead}, or train without the IFDSelectionPlugin.")


def _count_planned_steps(cfg: Any, args: Any) -> None:
    """Undo what axolotl has made of the number of steps that all rows would take."""
    if not cfg.get("max_steps"):
        args.max_steps = -1
    if cfg.get("warmup_steps") is None:
        ratio = cfg.get("warmup_ratio")
        args.warmup_steps = _WARMUP if ratio is None else ratio
