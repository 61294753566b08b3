"""What a command says when it is done."""


def of_training(result: dict) -> str:
    """A table of what was trained, how good it is beside gzip, how fast it was and where the time went."""
    seconds = result["seconds"]
    speed = result["tokens"] / max(seconds["train"], 1e-9)
    utilisation = speed * result["flops_per_token"] / result["peak_flops"]
    rows = [
        ("steps", f"{result['steps']:,} ({result['tokens']:,} tokens)"),
        *_quality(result),
        ("tokens a second", f"{speed:,.0f} in training; MFU {utilisation:.1%} of {result['peak_flops'] / 1e9:,.0f} "
                            "GFLOP/s, this machine's best product"),
        *_decoding(result["decoding"]),
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())),
        ("in", f"{result['workdir']}: metrics.jsonl, samples.md, tensorboard/, checkpoints/"),
    ]
    return _table(rows)


def of_evaluation(result: dict) -> str:
    """The same for an evaluation alone; weights that come without a run are of no step."""
    step = [("step", f"{result['step']:,}")] if "step" in result else []
    return _table([*step, *_quality(result)])


def _quality(result: dict) -> list[tuple[str, str]]:
    v = result["validation"]
    rows = [("validation loss", f"{v['loss']:.4f} nats a token ({v['targets']:,} targets)"),
            ("bits per byte", f"{v['bits_per_byte']:.3f} on {result['held_out_bytes']:,} held-out bytes"),
            ("gzip -9", f"{result['gzip_bits_per_byte']:.3f} bits per byte on the same")]
    if v["mtp_accuracy"]:
        rows.append(("multi-token", "accuracy " + ", ".join(f"{x:.1%}" for x in v["mtp_accuracy"])
                     + " given the text before, by depth"))
    if "device_load" in v:
        rows.append(("experts", "fullest device {:.3f} times the mean, {:.3f} with redundant experts".format(
            *v["device_load"])))
    return rows


def _decoding(found: dict) -> list[tuple[str, str]]:
    rows = []
    if "plain" in found:
        rows.append(("decoding", f"{found['plain'].tokens_per_second:,.0f} tokens/s, greedy, one prompt at a time"))
    if "drafted" in found:
        drafted = found["drafted"]
        rates = ", ".join(f"{rate:.1%}" for rate in drafted.acceptance_rate)
        same = sum(a == b for a, b in zip(drafted.tokens, found["plain"].tokens, strict=True))
        rows.append(("with drafts", f"{drafted.tokens_per_second:,.0f} tokens/s, {same} of {len(drafted.tokens)} texts "
                                    f"the same; {rates} accepted, "
                                    f"{drafted.tokens_per_step:.2f} tokens a step"))
    return rows


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:>{width}}  {value}" for name, value in rows)
