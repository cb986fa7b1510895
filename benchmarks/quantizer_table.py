"""What quantizers.py prints: every method's error and speed, and ours beside each peer's at equal bits and equal format."""

from __future__ import annotations

from typing import Any

from quantizer_methods import FP8, NF4_DQ, NF4_PLAIN, NOT_MEASURED, POSITIVE, SIGNED, SLOW, SLOW_ROWS, SPEED_SHAPE

TOLERANCE = 1e-5  # of the error; NF4's offset is the last bit of a mean, see quant/schemes/nf4.py

# Which of ours is held against which peers, by format.
MINE = {POSITIVE: "search, g128", SIGNED: "signed, g128", NF4_DQ: "NF4", NF4_PLAIN: "NF4"} | dict.fromkeys(
    FP8.values(), "FP8 search"
)


def verdicts(told: dict[str, Any]) -> list[dict[str, Any]]:
    """Our error by the peer's for each peer in our format, and whether it is nowhere above 1."""
    found = []
    for form, name in MINE.items():
        mine = next(r for r in told["rows"] if r["by"] == "ours" and r["format"] == form and r["method"] == name)
        for row in told["rows"]:
            # AutoRound's round to nearest also against the scale above zero: the default must not lose to it.
            other = form == POSITIVE and row["method"].startswith("round to nearest")
            if row["by"] == "ours" or (row["format"] != form and not other):
                continue
            ratios = {tensor: mine["error"][tensor] / error for tensor, error in row["error"].items()}
            worse = max(ratios.values()) > 1 + TOLERANCE
            found.append({"ours": name, "format": form, "by": row["by"], "method": row["method"], "ratios": ratios})
            found[-1] |= {"worse": worse and row["by"] != "oracle", "same_bytes": row.get("same_bytes")}
    return found


def tell(told: dict[str, Any]) -> None:
    names = list(told["tensors"])
    print(f"| by | method | format | bits | {' | '.join(names)} | GB/s | of a copy |")
    print("|---" * (len(names) + 6) + "|")
    order = [*MINE, *sorted({row["format"] for row in told["rows"]} - {*MINE})]
    for row in sorted(told["rows"], key=lambda row: order.index(row["format"])):
        errors = " | ".join(f"{row['error'][name]:.5f}" for name in names)
        speed = f"{row['gb_per_s']:.3g} | {row['of_copy']:.2g}" if "gb_per_s" in row else "- | -"
        by = f"**{row['by']}**" if row["by"] == "ours" else row["by"]
        print(f"| {by} | {row['method']} | {row['format']} | {row['bits']:.3f} | {errors} | {speed} |")
    shapes = ", ".join(f"{name} {shape[0]} x {shape[1]}" for name, shape in told["tensors"].items())
    print(
        f"\nRelative squared error ({shapes}), and bf16 read. {told['date']}, {told['machine']}, {told['threads']}"
        f" threads; median of {told['rounds']} rounds, each call beside a copy of the matrix ({told['copy_gb_per_s']:.1f} GB/s)."
        f" Other work took {told['other_work']:.0%} of the cores meanwhile. What is slower than {SLOW} GB/s was timed on"
        f" {SLOW_ROWS} of {SPEED_SHAPE[0]} rows, in 3 rounds."
    )
    print("\nOur error by the peer's, at equal bits and equal format:\n")
    print(f"| ours | against | {' | '.join(names)} | |")
    print("|---" * (len(names) + 3) + "|")
    found = verdicts(told)
    for one in found:
        ratios = " | ".join(f"{one['ratios'][name]:.4f}" for name in names)
        remark = "WORSE" if one["worse"] else "the limit" if one["by"] == "oracle" else "not worse"
        if one["same_bytes"] is not None:
            what = (
                "NF4 codes"
                if "NF4" in one["format"]
                else "bytes of FP8 plain"
                if "FP8" in one["format"]
                else "bytes of our plain"
            )
            remark += f"; {'the' if one['same_bytes'] else 'NOT the'} {what}"
        print(f"| {one['ours']}: {one['format']} | {one['by']}: {one['method']} | {ratios} | {remark} |")
    lost = [one for one in found if one["worse"]]
    peers = sum(one["by"] != "oracle" for one in found)
    print(
        f"\n{'WORSE than a peer in ' + str(len(lost)) if lost else 'Never worse than a peer in any'} of {peers} comparisons."
    )
    for one in lost:
        most = max(one["ratios"].values()) - 1
        print(f"- {one['ours']} by up to {most:.2%}: {one['by']}, {one['method']} ({one['format']})")
    print("\nOther formats with zero points or wider scales, beside ours of the same bits, for orientation:\n")
    print(f"| ours | beside | bits | {' | '.join(names)} |")
    print("|---" * (len(names) + 3) + "|")
    for row in told["rows"]:
        if row["format"].startswith("int4") and row["format"] not in MINE and row["by"] != "ours":
            for mine in told["rows"]:
                if mine["by"] == "ours" and mine["bits"] == row["bits"] and mine["method"].startswith(("se", "si")):
                    ratios = " | ".join(f"{mine['error'][name] / row['error'][name]:.4f}" for name in names)
                    beside = f"{row['by']}: {row['method']}, {row['format']}"
                    print(f"| {mine['method']} | {beside} | {row['bits']:.2f} | {ratios} |")
    print()
    for name, reason in told["skipped"].items():
        print(f"SKIPPED {name}: {reason}")
    if not told["skipped"]:
        print("No peer was skipped.")
    for name, reason in NOT_MEASURED.items():
        print(f"Not measured: {name}: {reason}.")
    print("Versions: " + ", ".join(f"{name} {version}" for name, version in told["versions"].items()) + ".")
