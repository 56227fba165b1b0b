"""Preflight: the list of findings, and functions that run on all ranks without leaving one waiting."""

from xc.errors import UserError

MIB = 2**20


class Report:
    """Findings, printed as they are made if `prints` is set.

    findings  [(state, name, value, remedy)], state: ok | warning | wrong; remedy: what to do, "" where nothing is
    """

    def __init__(self, prints=False):
        self.findings, self._prints = [], prints
        if prints:
            print(f"{'state':8} {'finding':14} value -> remedy", flush=True)

    def add(self, name, value, state="ok", remedy=""):
        """Add a finding."""
        self.findings.append((state, name, value, remedy))
        if self._prints:
            print(f"{state:8} {name:14} {value}" + (f" -> {remedy}" if remedy else ""), flush=True)

    def add_checked(self, name, value, fault, remedy, state="warning"):
        """Add a finding: ok if `fault` is empty, otherwise `state` with the text of the fault and the remedy."""
        if fault:
            self.add(name, f"{value}: {fault}", state, remedy)
        else:
            self.add(name, value)

    def run(self, name, function, *arguments):
        """Return function(report, *arguments). A UserError in it becomes a finding of this name; returns None then."""
        try:
            return function(self, *arguments)
        except UserError as error:
            self.add(name, str(error), "wrong")

    def conclusion(self):
        """(exit code, last line). The code is 2 if something is wrong."""
        counts = {state: sum(found == state for found, *_ in self.findings) for state in ("wrong", "warning")}
        return 2 * bool(counts["wrong"]), f"{counts['wrong']} wrong, {counts['warning']} with a warning"


def on_all_ranks(world, function):
    """[function() of every rank]. An error on any rank becomes the same UserError on all ranks. Collective.

    The function must not use collectives.
    """
    result = error = None
    try:
        result = function()
    except Exception as e:
        error = " ".join(str(e).split()) or repr(e)
    results, errors = zip(*world.all_ranks.all_gather_object((result, error)), strict=True)
    for rank, error in enumerate(errors):
        if error is not None:
            raise UserError(error if len(set(errors)) == 1 else f"rank {rank}: {error}")
    return list(results)


def on_rank_0(world, function):
    """function() of rank 0, on all ranks. Errors are those of `on_all_ranks`. Collective."""
    return on_all_ranks(world, lambda: function() if world.rank == 0 else None)[0]


def listed(texts, most=4, number=0):
    """The first texts with commas between them, and how many more there are. number: of all texts, where not all are
    given"""
    texts = list(texts)
    number = number or len(texts)
    return ", ".join(texts[:most]) + (f" and {number - most:,} more" if number > most else "")


def size_text(num_bytes):
    """The number of bytes in MiB or GiB."""
    return f"{num_bytes / MIB:,.0f} MiB" if num_bytes < 10 * 2**30 else f"{num_bytes / 2**30:,.1f} GiB"
