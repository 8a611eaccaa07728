"""Is the end of a command with a mistake in it the right one?"""

from tests.campaign.allowed import SAID_OTHERWISE, is_allowed
from tests.campaign.mutations import REMOVED, sources
from tests.campaign.running import names

# Valid values that these runs do not wait for.
SLOW = ("compile:true",)


def verdict(base, mutation, outcome):
    """What is wrong with an outcome, in words; empty where nothing is."""
    if outcome.kind == "reached":
        return "" if is_allowed(mutation) else "accepted in silence"
    if outcome.kind != "refused":
        return f"{outcome.kind}, not one line"
    said = SAID_OTHERWISE.get((mutation.setting, mutation.kind))
    told = sources(base.cfg, mutation.setting)
    if mutation.kind == REMOVED:
        told.append(mutation.setting.rpartition(".")[0] or mutation.setting)
    return "" if (said and said in outcome.message) or any(names(outcome.message, one) for one in told) else "another setting is named"


def thinned(mutations, every, first=0):
    """Every so many of a base's mutations, from the `first` on; those that no run waits for are left out."""
    return [one for one in mutations if str(one) not in SLOW][first % every :: every]
