"""The report of a plan, as text and as JSON."""

from typing import Any

from .gpus import GIB
from .planning import Plan, longest_row
from .proposals import CHANGES_TRAINING, Proposal

_SMALL = 0.005  # parts with a smaller share are shown as one


def format_plan(plan: Plan, proposals: list[Proposal], name: str) -> str:
    """Format memory, time and proposals; `name` is the configuration's file name."""
    sections = [_head(plan, name), _gpu_table(plan), _verdict(plan), _host(plan), _time(plan)]
    return "\n\n".join([*sections, _proposals(plan, proposals)])


def _head(plan: Plan, name: str) -> str:
    job = plan.jobs[plan.largest]
    phase = f", phase {plan.largest + 1} of {len(plan.jobs)}" if len(plan.jobs) > 1 else ""
    return (
        f"{name} on {plan.gpus} x {plan.gpu.name}{phase}: {job.parameters / 1e9:.3g} B parameters, "
        f"dp {job.dp} x sp {job.sp}, ZeRO stage {job.zero}, {job.tokens:,} tokens per rank "
        f"({job.phase.micro_batch} x {job.phase.seq_len:,} / {job.sp}), norms and MLPs by "
        f"{'Liger' if job.runs_liger else 'torch'}, recompute = {job.recompute}\n"
        "predicted from formulas (docs/planning.md), not measured"
    )


def _gpu_table(plan: Plan) -> str:
    peak, needed = plan.memory.peak, plan.memory.needed
    rows = [(name, size) for name, size in peak.parts.items() if size >= _SMALL * needed]
    rows = sorted(rows, key=lambda row: -row[1])
    rest = peak.total - sum(size for _, size in rows)
    lines = [
        f"GPU memory per rank at its peak: {peak.name}",
        f"{'part':<24}{'GiB':>8}{'share':>8}",
    ]
    for part, size in [*rows, ("other parts", rest), ("overhead", plan.memory.overhead)]:
        lines.append(f"{part:<24}{size / GIB:>8.2f}{size / needed:>8.0%}")
    lines.append(f"{'total':<24}{needed / GIB:>8.2f}")
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    memory, peak = plan.memory, plan.memory.peak
    dominating = max(peak.parts, key=lambda part: peak.parts[part])
    capacity, needed = plan.gpu.memory / GIB, memory.needed / GIB
    word, left = ("fits", "to spare") if plan.fits else ("does not fit", "missing")
    row = longest_row(plan)
    longest = f"longest row that fits: {row:,} tokens" if row else "no row length fits"
    lines = [
        f"{word}: {needed:.1f} of {capacity:g} GiB, {abs(plan.margin) / GIB:.1f} GiB {left}; the "
        f"largest part is {dominating} ({peak.parts[dominating] / memory.needed:.0%})",
        f"{longest}, with all other settings unchanged",
    ]
    for evaluation in (*plan.evaluations.values(), *plan.prompts.values()):
        fits = evaluation.needed <= plan.gpu.memory
        verdict = "fits" if fits else "does not fit and will be skipped"
        lines.append(f"{evaluation.peak.name}: {evaluation.needed / GIB:.1f} GiB, {verdict}")
    return "\n".join(lines)


def _host(plan: Plan) -> str:
    host, ranks = plan.host, min(plan.gpus, plan.gpu.per_node)
    parts = [f"{part} {size / GIB:.1f}" for part, size in host.parts.items() if size >= GIB / 10]
    mapped = f"; token files {host.mapped / GIB:.1f} GiB, shared and mapped" if host.mapped else ""
    return (
        f"host memory: {host.needed / GIB:.1f} GiB per rank, {host.needed * ranks / GIB:.0f} GiB "
        f"for {ranks} ranks on a node ({', '.join(parts)}; at the start {host.start / GIB:.1f})"
        f"{mapped}"
    )


def _time(plan: Plan) -> str:
    time, phase = plan.time, plan.jobs[-1].phase
    rate = time.tokens_per_second
    lines = [
        f"step of {phase.rows_per_step} rows of {phase.seq_len:,} tokens: {time.seconds:.2f} s, "
        f"{rate:,.0f} tokens/s ({rate / plan.gpus:,.0f} per GPU), MFU {time.mfu:.0%}",
        f"{'part':<24}{'s':>8}{'share':>8}",
    ]
    for part, seconds in sorted(time.parts.items(), key=lambda item: -item[1]):
        if seconds >= _SMALL * time.seconds:
            lines.append(f"{part:<24}{seconds:>8.2f}{seconds / time.seconds:>8.0%}")
    return "\n".join(lines)


def _proposals(plan: Plan, proposals: list[Proposal]) -> str:
    if not proposals:
        if plan.fits:
            return "proposals: no change costs noticeably less"
        if not plan.can_start:
            return "proposals: none, since each GPU must hold the whole model at the start"
        return "proposals: no combination of settings fits"
    title = "proposals that cost less" if plan.fits else "proposals that fit"
    lines = [
        f"{title}, cheapest first (now {plan.cost:.1f} GPU seconds per step)",
        f"{'GPU GiB':>8}{'host GiB':>10}{'s/step':>10}{'GPU s':>10}  change",
    ]
    for proposal in proposals:
        other = proposal.plan
        note = " (changes training)" if set(CHANGES_TRAINING) & set(proposal.settings) else ""
        lines.append(
            f"{other.memory.needed / GIB:>8.1f}{other.host.needed / GIB:>10.1f}"
            f"{other.time.seconds:>10.2f}{other.cost:>10.1f}  {proposal}{note}"
        )
    return "\n".join(lines)


def plan_json(plan: Plan, proposals: list[Proposal]) -> dict[str, Any]:
    """All numbers of a plan, in bytes and seconds."""
    return {
        "gpus": plan.gpus,
        "gpu": plan.gpu.name,
        "gpu_bytes": plan.gpu.memory,
        "fits": plan.fits,
        "margin_bytes": plan.margin,
        "needed_bytes": plan.memory.needed,
        "allocated_bytes": plan.memory.allocated,
        "peak": plan.memory.peak.name,
        "phases": {snapshot.name: snapshot.parts for snapshot in plan.memory.snapshots},
        "longest_row": longest_row(plan),
        "evaluations": {
            length: {"needed_bytes": memory.needed, "parts": memory.peak.parts}
            for length, memory in plan.evaluations.items()
        },
        "prompts": {
            length: {"needed_bytes": memory.needed, "parts": memory.peak.parts}
            for length, memory in plan.prompts.items()
        },
        "host_bytes": plan.host.needed,
        "host": plan.host.parts,
        "step_seconds": plan.time.seconds,
        "tokens_per_second": plan.time.tokens_per_second,
        "mfu": plan.time.mfu,
        "time": plan.time.parts,
        "proposals": [
            {
                "changes": dict(proposal.changes),
                "needed_bytes": proposal.plan.memory.needed,
                "host_bytes": proposal.plan.host.needed,
                "step_seconds": proposal.plan.time.seconds,
                "gpu_seconds": proposal.plan.cost,
            }
            for proposal in proposals
        ],
    }
