"""Figures that are plots: of a prompt's vectors, of the loss, of the learned vector's way."""

from pathlib import Path

import torch
import torch.nn.functional as F

from tinyldm.inversion import known_norm
from tinyldm.lab.figures.subject import TOKEN, Subject
from tinyldm.lab.paper.plots import new_figure, save_figure
from tinyldm.sampler import first_noise

NUMBERS = 48  # of a token's vector that are drawn
BETWEEN = range(25, 1000, 50)  # timesteps
NOISES = 8  # for each picture and timestep
NEAREST = 3  # words


def tokens(subject: Subject, file: Path) -> None:
    """The first numbers of what the text encoder reads for each token of a prompt."""
    tokenizer, prompt = subject.model.tokenizer, f"a photo of {TOKEN} on a red background"
    ids = tokenizer(prompt)[0][: len(tokenizer.encode(prompt)) + 2]
    table = torch.cat([subject.model.text_encoder.table, subject.words[TOKEN]])
    read = table[ids]
    names = ["start", *(tokenizer.decode([i]) for i in ids[1:-1]), "end"]
    figure = new_figure(9, 3.2)
    axes = figure.subplots()
    most = subject.model.text_encoder.table.abs().quantile(0.999).item()
    shown = axes.imshow(read[:, :NUMBERS], cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set_yticks(range(len(ids)), [f"{name}   {i}" for name, i in zip(names, ids.tolist(), strict=True)])
    axes.set_xlabel(f"the first {NUMBERS} of {table.shape[1]} numbers")
    figure.colorbar(shown)
    save_figure(figure, file)


@torch.no_grad()
def loss(subject: Subject, file: Path) -> None:
    """Equation 2's loss by timestep: with the word, with the word it started from, and in plain words."""
    model, (first, last) = subject.model, (min(subject.way), max(subject.way))
    z_0 = model.encode(subject.pictures)[0].repeat(NOISES, 1, 1, 1)
    eps, _ = first_noise(z_0.shape[1:], range(len(z_0)))
    read = {
        f"“a photo of {TOKEN}”, before learning": (f"a photo of {TOKEN}", first),
        f"“a photo of {TOKEN}”, after {last} steps": (f"a photo of {TOKEN}", last),
        f"“a photo of {subject.plainly}”": (f"a photo of {subject.plainly}", last),
        "nothing": ("", last),
    }
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name, (prompt, step) in read.items():
        context = model.context([prompt], {TOKEN: subject.way[step]}).expand(len(z_0), -1, -1)
        losses = []
        for t in BETWEEN:
            z_t = model.schedule.add_noise(z_0, eps, t)
            output = model.predict(z_t, torch.full((len(z_0),), t), context)
            losses.append(F.mse_loss(output, model.schedule.target(z_0, eps, t)).item())
        axes.plot(BETWEEN, losses, label=name)
    axes.set(xlabel="timestep t", ylabel=f"mean squared error of {model.schedule.prediction}", yscale="log")
    axes.legend(title="what the model reads", loc="upper center")
    axes.grid(alpha=0.3)
    save_figure(figure, file)


def path(subject: Subject, file: Path) -> None:
    """The vector while it is learned: how long it is, and which words point most nearly where it does."""
    model = subject.model
    table, steps = model.text_encoder.table[: model.tokenizer.vocabulary_size], [*subject.way]
    vectors = torch.cat([*subject.way.values()])
    figure = new_figure(9, 4)
    lengths, cosines = figure.subplots(1, 2)
    lengths.plot(steps, vectors.norm(dim=1), label=TOKEN)
    lengths.axhline(known_norm(model), color="grey", linestyle=":", label="median of known words")
    lengths.set(xlabel="steps", ylabel="norm", ylim=0)
    lengths.legend()
    near = F.cosine_similarity(vectors[:, None], table[None], dim=2)
    best = {int(i) for row in (0, len(steps) // 2, -1) for i in near[row].topk(NEAREST).indices}
    for i in sorted(best, key=lambda i: -near[-1, i]):
        cosines.plot(steps, near[:, i], label=model.tokenizer.decode([i]) or model.tokenizer.symbols[i])
    cosines.set(xlabel="steps", ylabel="cosine with a known word")
    cosines.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (lengths, cosines):
        axes.grid(alpha=0.3)
    save_figure(figure, file)
