"""Preflight: the findings, and how ranks look at something together."""

from xc.errors import UserError

MIB = 2**20


class Report:
    """Findings, printed as they come where that is asked for.

    findings  [(state, name, value, remedy)], state: ok | warning | wrong; a remedy where there is one
    """

    def __init__(self, prints=False):
        self.findings, self._prints = [], prints
        if prints:
            print(f"{'state':8} {'finding':14} value -> remedy", flush=True)

    def __call__(self, name, value, state="ok", remedy=""):
        self.findings.append((state, name, value, remedy))
        if self._prints:
            print(f"{state:8} {name:14} {value}" + (f" -> {remedy}" if remedy else ""), flush=True)

    def judge(self, name, value, fault, remedy, state="warning"):
        """A finding that is a fault or not; `fault` says which one."""
        self(name, f"{value}: {fault}" if fault else value, *((state, remedy) if fault else ()))

    def look(self, name, function, *arguments):
        """What function(report, *arguments) returns; None where it raises a UserError, which is a finding."""
        try:
            return function(self, *arguments)
        except UserError as error:
            self(name, str(error), "wrong")

    def conclusion(self):
        """(exit code, last line)."""
        counts = {state: sum(found == state for found, *_ in self.findings) for state in ("wrong", "warning")}
        return 2 * bool(counts["wrong"]), f"{counts['wrong']} wrong, {counts['warning']} with a warning"


def of_all(world, look):
    """[look() of every rank]; what goes wrong in it on any of them becomes the same UserError on all. Collective."""
    found = error = None
    try:
        found = look()
    except Exception as e:
        error = " ".join(str(e).split()) or repr(e)
    found, errors = zip(*world.all_ranks.all_gather_object((found, error)), strict=True)
    for rank, error in enumerate(errors):
        if error is not None:
            raise UserError(error if len(set(errors)) == 1 else f"rank {rank}: {error}")
    return list(found)


def of_first(world, look):
    """look() of rank 0, as `of_all`."""
    return of_all(world, lambda: look() if world.rank == 0 else None)[0]


def shown(texts, most=4):
    """The first of them, and how many there are."""
    texts = list(texts)
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def size_text(number):
    return f"{number / MIB:,.0f} MiB" if number < 10 * 2**30 else f"{number / 2**30:,.1f} GiB"
