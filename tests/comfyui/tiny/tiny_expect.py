"""Shorthands for what Sage3 Report says."""

LARGEST_ERROR = {"int8": 0.02, "fp4": 0.2}  # of one call, relative; measured: 0.01 and 0.11


def served(report, kernel=None):
    """Calls that a low-bit kernel served (of the name given), by the report's lines."""
    return sum(n for _, k, _, _, n in report["lines"] if k != "exact" and (kernel is None or k == kernel))


def fell_back(report):
    return sum(n for *_, fell, n in report["lines"] if fell)


def kept_exact(report):
    """Calls that stayed exact because that was wished."""
    return sum(n for _, k, _, fell, n in report["lines"] if k == "exact" and not fell)


def total(report):
    return sum(n for *_, n in report["lines"])


def reasons(report):
    return " ".join(reason for _, _, reason, _, _ in report["lines"])


def follows(seen, int8):
    """int8 is near the result of a changed model, which is far from that of the model as it was ("matters"), and far from
    what it would be if attention alone had not noticed the change ("deaf")."""
    assert seen["matters"] > 0.1
    assert seen["deaf"] > 0.03
    assert 0 < int8 < min(LARGEST_ERROR["int8"], seen["matters"] / 20, seen["deaf"] / 10)
