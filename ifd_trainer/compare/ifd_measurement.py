"""IFD as a measurement of `evaluate`: how hard answers are to follow from their prompts, for a model.

>>> import evaluate                                                                             # doctest: +SKIP
>>> from ifd_trainer.compare import ifd_measurement                                             # doctest: +SKIP
>>> ifd = evaluate.load(ifd_measurement.__file__, module_type="measurement")                    # doctest: +SKIP
>>> ifd.compute(prompts=["Add 1 and 2.\\n"], predictions=["3"], model="HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
{'ifd': 0.62, 'ifds': [0.62], 'cas': [1.9], 'das': [3.1], 'scored': 1}
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

# By their names: `evaluate` imports a copy of this file.
from ifd_trainer.data.formats import TemplateFormat
from ifd_trainer.scoring.transform import IFDScorer

_CITATION = "Li et al., From Quantity to Quality, arXiv 2308.12032, NAACL 2024"
_DESCRIPTION = (
    "Instruction-Following Difficulty: the mean loss of an answer's tokens given its prompt, over that of the same "
    "tokens alone. Above 1 the prompt does not help the model."
)
_INPUTS = """
Args:
    prompts: texts before the answers, with whatever a template adds.
    predictions: the answers: those of a data set, or a model's.
    model: what scores: a hub name, a path or a loaded causal LM.
    header: what stands before an answer that is scored alone, such as "### Response:"; BOS by default.
    options: other arguments of `IFDScorer`.

Returns:
    ifd: the mean over the answers that have a score, nan without any.
    ifds, cas, das: of each answer, None where it has no score; cas and das in nats per token.
    scored: how many have one.
"""


class IFD(evaluate.Measurement):
    """See the description that it gives `evaluate`."""

    def _info(self) -> evaluate.MeasurementInfo:
        text = datasets.Value("string")
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"prompts": text, "predictions": text}),
        )

    def _compute(
        self, prompts: list[str], predictions: list[str], model: Any, header: str = "", **options: Any
    ) -> dict[str, Any]:
        format = TemplateFormat(
            "evaluate", "{instruction}", "{instruction}", header, instruction="prompts", output="predictions"
        )
        scores = IFDScorer(model, format=format, **options)({"prompts": prompts, "predictions": predictions})
        columns = {
            name: [None if x is None or np.isnan(x) else float(x) for x in scores[name]]
            for name in ("ifd", "cas", "das")
        }
        known = [value for value in columns["ifd"] if value is not None]
        return {
            "ifd": float(np.mean(known)) if known else float("nan"),
            "ifds": columns["ifd"],
            "cas": columns["cas"],
            "das": columns["das"],
            "scored": len(known),
        }
