"""A picture of a schedule: learning rate and batch over the run, before anything is trained."""

from pathlib import Path

from xc.optim.schedule import Progress


def draw(schedule, path, world):
    """Write the picture of a Schedule and print a line that sums it up, on rank 0. Collective.

    UserError where it cannot be written.
    """
    with world.raise_on_all_ranks():
        if world.rank == 0:
            _draw(schedule, path)


def _draw(schedule, path):
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--schedule-plot {path} is not the name of a picture: let it end in .png, .svg or .pdf")
    from matplotlib.figure import Figure  # its import takes a second; a bare Figure needs no display

    steps = list(steps_of(schedule))
    epochs = [progress.examples / schedule.num_records for progress, _ in steps]
    figure = Figure(figsize=(8, 5), layout="constrained")
    rate, batch = figure.subplots(2, sharex=True)
    rate.plot(epochs, [plan.lr for _, plan in steps], color="tab:blue")
    rate.set_ylabel("learning rate")
    batch.step(epochs, [plan.global_batch for _, plan in steps], color="tab:orange", where="post")
    batch.set_ylabel("examples per step")
    batch.set_xlabel("epochs")
    batch.set_ylim(0)
    text = f"{schedule.kind}, {schedule.examples:,} examples"
    if schedule.auto:
        text += f", {schedule.least_steps:,} to {schedule.length:,} updates"
        batch.axhline(schedule.max_accumulation_steps * schedule.batch, color="grey", linestyle=":")
        batch.set_title("grows with the noise of the gradients, at most to the dotted line", fontsize="small")
    else:
        text += f", {schedule.num_steps:,} updates"
    rate.set_title(text)
    figure.savefig(path)
    print(f"{text}: {path}")


def steps_of(schedule):
    """Yields (Progress before it, StepPlan) of every step; with `auto` the batch does not grow."""
    progress = Progress()
    while progress.examples < schedule.examples:
        plan = schedule.plan(progress)
        yield progress, plan
        progress = progress.after(plan)
