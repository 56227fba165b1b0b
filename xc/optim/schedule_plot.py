"""A picture of a schedule: learning rate and batch over the run, before anything is trained."""

from pathlib import Path

from xc.optim.schedule import Position


def draw(schedule, path, world):
    """Rank 0 writes the picture. Collective."""
    with world.raise_on_all_ranks():
        if world.rank == 0:
            _draw(schedule, path)


def _draw(schedule, path):
    """Writes the picture and prints what it shows in a line. OSError, ValueError where it cannot be written."""
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--schedule-plot {path} is not the name of a picture: let it end in .png, .svg or .pdf")
    from matplotlib.figure import Figure  # takes a second; a figure of its own needs no display

    steps = list(steps_of(schedule))
    epochs = [position.examples / schedule.num_records for position, _ in steps]
    figure = Figure(figsize=(8, 5), layout="constrained")
    rate, batch = figure.subplots(2, sharex=True)
    rate.plot(epochs, [now.lr for _, now in steps], color="tab:blue")
    rate.set_ylabel("learning rate")
    batch.step(epochs, [now.global_batch for _, now in steps], color="tab:orange", where="post")
    batch.set_ylabel("examples per step")
    batch.set_xlabel("epochs")
    batch.set_ylim(0)
    text = f"{schedule.kind}, {schedule.rounds * schedule.batch:,} examples"
    if schedule.auto:
        text += f", {schedule.least_steps:,} to {schedule.rounds:,} updates"
        batch.axhline(schedule.most * schedule.batch, color="grey", linestyle=":")
        batch.set_title("grows with the gradients' noise, to the dotted line at most", fontsize="small")
    else:
        text += f", {schedule.num_steps:,} updates"
    rate.set_title(text)
    figure.savefig(path)
    print(f"{text}: {path}")


def steps_of(schedule):
    """(Position before it, Now) of every step; with `auto` as if the noise stayed as it is."""
    position = Position()
    while position.examples < schedule.examples:
        now = schedule.at(position)
        yield position, now
        position = position.after(now)
