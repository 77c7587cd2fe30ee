"""Whether a claim held: the difference of two recipes' means over seeds, its sign for each seed, and what is a tie."""
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

TIES = {"accuracy": 0.02, "nats_per_token": 0.01}  # smaller differences: 2 points; 1 % of a perplexity


def judged(claims: Sequence, cells: Sequence[Mapping], longer: Sequence[Mapping] = ()) -> list[dict]:
    """A row for every claim and task: the verdict of the plain run, and what the longer one said where there was one."""
    rows = []
    for task, ratio in dict.fromkeys((cell["task"], cell["ratio"]) for cell in cells if cell["recipe"] != "teacher"):
        here = [cell for cell in cells if (cell["task"], cell["ratio"]) == (task, ratio)]
        more = [cell for cell in longer if (cell["task"], cell["ratio"]) == (task, ratio)]
        for claim in claims:
            row = {"task": task, "ratio": ratio, **claim._asdict(), **compared(claim, here)}
            sides = [cell for cell in more if cell["recipe"] in (claim.ahead, claim.behind)]
            if row["verdict"] != "held" and len({cell["recipe"] for cell in sides}) == 2:  # others' claims may share a side
                row["longer"] = compared(claim, sides) | {"steps": sides[0]["steps"]}
            rows.append(row)
    return rows


def compared(claim, cells: Sequence[Mapping]) -> dict:
    """verdict: held, a tie, the opposite, mixed where the seeds do not agree on the sign, or failed where a side has no
    number; a claim of no loss holds for a tie, too. gains: for each seed, positive where the claim holds."""
    sides = [{cell["seed"]: cell for cell in cells if cell["recipe"] == recipe} for recipe in (claim.ahead, claim.behind)]
    kind = next(cell["score_is"] for side in sides for cell in side.values())
    if any(cell["score"] is None for side in sides for cell in side.values()):
        return {"verdict": "failed", "gain": None, "gains": []}
    sign = -1 if kind == "nats_per_token" else 1
    gain = sign * (mean(cell["score"] for cell in sides[0].values()) - mean(cell["score"] for cell in sides[1].values()))
    seeds = sides[0].keys() & sides[1].keys()
    gains = [sign * (sides[0][seed]["score"] - sides[1][seed]["score"]) for seed in sorted(seeds)]
    verdict = "held" if gain >= TIES[kind] else "the opposite" if gain <= -TIES[kind] else "a tie"
    if verdict != "a tie" and any(one * gain <= 0 for one in gains):
        verdict = "mixed"
    if verdict == "a tie" and claim.of_no_loss:
        verdict = "held"
    return {"verdict": verdict, "gain": gain, "gains": gains}


def summary(cells: Sequence[Mapping]) -> list[dict]:
    """A row for every recipe on every task: mean, spread and range over seeds."""
    groups: dict[tuple, list[Mapping]] = {}
    for cell in cells:
        groups.setdefault((cell["task"], cell["ratio"], cell["recipe"], cell["steps"]), []).append(cell)
    rows = []
    for (task, ratio, recipe, steps), members in groups.items():
        scores = [cell["score"] for cell in members if cell["score"] is not None]
        kept = [cell["kept"] for cell in members if cell["kept"] is not None]
        rows.append({"task": task, "ratio": ratio, "recipe": recipe, "steps": steps, "seeds": len(members),
                     "score_is": members[0]["score_is"], "kept": max(kept, default=None),
                     "mean": mean(scores) if scores else None, "spread": stdev(scores) if len(scores) > 1 else None,
                     "scores": scores, "failed": len(members) - len(scores),
                     "seconds": mean(cell["seconds"] for cell in members)})
    return rows
