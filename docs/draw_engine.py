"""Draw docs/engine.svg: which image is in which row of the batch, pass by pass, in a run of PGD on 20 sample images.

python docs/draw_engine.py
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from guardians.attacks import PGD
from guardians.data import load_data
from guardians.engine.state import Answer, Progress, State
from guardians.models import load_model

PASSES: list[np.ndarray] = []


class Watched(PGD):
    """PGD that notes which images it is asked about."""

    def update(self, state: State, answer: Answer) -> Progress:
        """Note them."""
        PASSES.append(state.known["index"].copy())
        return super().update(state, answer)


def main() -> None:
    """Run and draw."""
    data = load_data(n=20)
    options: dict[str, Any] = {"eps": 8 / 255, "eps_step": 2 / 255, "max_iter": 10, "batch_size": 6, "seed": 0}
    attack = Watched(load_model("resnet9-16-fgsm-at"), **options, early_stop=True, precision="float32", verbose=False)
    attack(data.as_floats(), data.labels)
    figure = Figure(figsize=(9, 2.6))
    axes = figure.subplots()
    colours = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
    seen: set[int] = set()
    for number, rows in enumerate(PASSES):
        for row, image in enumerate(rows):
            is_vacant = image in rows[:row]
            axes.add_patch(mpl.patches.Rectangle((number, row), 1, 0.9, color="0.9" if is_vacant else colours[image]))
            if image not in seen:
                axes.text(number + 0.5, row + 0.47, str(image), ha="center", va="center", fontsize=7)
            seen.add(int(image))
    axes.set(xlim=(0, len(PASSES)), ylim=(max(map(len, PASSES)), 0), xlabel="pass through the model", ylabel="row")
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    with mpl.rc_context({"svg.hashsalt": "guardians"}):
        figure.savefig(Path(__file__).with_name("engine.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
