"""The report in ten lines for the terminal."""

from typing import Any

from persyn_jax.reporting.text import count, difference, percent, plural, score


def summary_lines(report: dict[str, Any]) -> list[str]:
    """Ten lines that say what the run did and what came of it."""
    run, prompts, router = report["run"], report["prompts"], report["router"]
    cost, student, gossip = report["cost"], report["student"], report["gossip"]
    teachers = report["teachers"]["by_teacher"]
    busiest = max(teachers, key=lambda name: teachers[name]["routed"])
    unusable = sum(t["calibration_answers"] - t["usable"] for t in teachers.values())
    seconds = {name: stage["seconds"] for name, stage in report["stages"].items()}
    slowest = max(seconds, key=lambda name: seconds[name])
    rows = {
        "run": f"{run['name']}, seed {run['seed']}, student {run['student_model']},"
        f" {run['platform']}",
        "prompts": f"{count(prompts['calibration'])} calibration, {count(prompts['train'])} train,"
        f" {count(prompts['eval'])} eval, from {plural(len(prompts['sources']), 'source')}",
        "teachers": f"{len(teachers)}; {busiest} got {percent(teachers[busiest]['routed_share'])}"
        f" of the routes; {count(unusable)} calibration answers unusable",
        "router": router["verdict"],
        "regret": ", ".join(
            f"{name.replace('_', ' ')} {score(regret)}" for name, regret in router["regret"].items()
        ),
        "answers": f"{count(cost['answers_generated'])} generated;"
        f" generate-then-select: {count(cost['answers_generate_then_select'])}",
        "score": f"{score(student['before']['mean'])} -> {score(student['after']['mean'])},"
        f" difference {difference(student['paired_difference'])}"
        f" on {count(student['eval_prompts'])} prompts",
        "training": f"{count(student['training_examples'])} examples,"
        f" {count(student['training_tokens'])} tokens, held-out loss"
        f" {score(student['held_out_loss']['first'])} -> {score(student['held_out_loss']['last'])}",
        "gossip": f"{plural(gossip['workers'], 'worker')},"
        f" {plural(gossip['exchanges'], 'exchange')} in {plural(gossip['rounds'], 'round')},"
        f" total sum weight {gossip['sum_weight_total']:.6f},"
        f" {plural(gossip['compiled_programs'], 'compiled program')}",
        "time": f"{sum(seconds.values()):.0f} s; {slowest} took {seconds[slowest]:.0f} s",
    }
    return [f"{label:<10}{text}" for label, text in rows.items()]
