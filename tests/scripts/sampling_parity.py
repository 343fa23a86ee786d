"""The sampler against transformers' logits processors: the same tokens are kept, with the same scores.

Cases on which transformers itself disagrees between float32 and float64 (a token exactly on a threshold) are left out.
"""
import json
import os
import subprocess
import sys
import tempfile

try:
    import torch
    from safetensors.torch import save_file
    from transformers.generation.logits_process import (
        LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor,
        TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper)
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)


def reference(config, ids, logits):
    steps = LogitsProcessorList()
    if config["logit_bias"]:
        steps.append(SequenceBiasLogitsProcessor({(int(k),): v for k, v in config["logit_bias"].items()}))
    if config["repetition_penalty"] != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(config["repetition_penalty"]))
    if not config["greedy"]:
        if config["temperature"] != 1.0:
            steps.append(TemperatureLogitsWarper(config["temperature"]))
        if config["top_k"]:
            steps.append(TopKLogitsWarper(config["top_k"]))
        if config["top_p"] < 1.0:
            steps.append(TopPLogitsWarper(config["top_p"]))
        if config["min_p"] > 0.0:
            steps.append(MinPLogitsWarper(config["min_p"]))
        if config["typical_p"] < 1.0:
            steps.append(TypicalLogitsWarper(config["typical_p"]))
    return steps(ids[None], logits[None].clone())[0]


def main():
    rng = torch.Generator().manual_seed(20)

    def pick(*choices):
        return choices[torch.randint(len(choices), (1,), generator=rng).item()]

    with tempfile.TemporaryDirectory() as folder:
        written = dropped = 0
        for number in range(400):
            size = pick(7, 300, 5000)
            logits = torch.randn(size, generator=rng) * pick(0.5, 3.0, 10.0)
            config = {
                "greedy": pick(False, False, False, True),
                "temperature": pick(1.0, 0.3, 0.7, 1.7),
                "top_k": pick(0, 0, 1, 5, 50, 100000),
                "top_p": pick(1.0, 1.0, 0.0, 0.3, 0.9, 0.99),
                "min_p": pick(0.0, 0.0, 0.05, 0.5, 1.0),
                "typical_p": pick(1.0, 1.0, 0.2, 0.9),
                "repetition_penalty": pick(1.0, 1.3, 0.8),
                "logit_bias": pick({}, {"3": 4.5, "6": -100.0}),
            }
            prompt = torch.randint(size, (pick(1, 20),), generator=rng)
            generated = torch.randint(size, (pick(1, 30),), generator=rng)
            ids = torch.cat([prompt, generated])
            want = reference(config, ids, logits)
            exact = reference(config, ids, logits.double())
            if not torch.equal(want == -float("inf"), exact == -float("inf")):
                dropped += 1
                continue
            save_file(
                {"in.logits": logits, "in.prompt": prompt, "in.generated": generated, "out.scores": want},
                os.path.join(folder, f"{number:03}.safetensors"),
                # One rounding of a division or product apart.
                metadata={"system": "sampling", "op": "process", "config": json.dumps(config), "rtol": "1e-6",
                          "atol": "1e-6"})
            written += 1
        print(f"{written} cases, {dropped} left out: on a threshold", flush=True)
        assert written > 350, "too few cases are left"
        run = subprocess.run([os.path.join(os.environ["MOIETY_BIN"], "moiety-conform"), folder], stdout=subprocess.PIPE,
                             text=True)
        lines = run.stdout.splitlines()
        print("\n".join(line for line in lines if not line.endswith(" ok")))
        assert run.returncode == 0 and lines[-1] == f"{written} passed, 0 failed", lines[-1:]


if __name__ == "__main__":
    main()
