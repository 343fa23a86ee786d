#!/usr/bin/env python3
"""What llama.cpp says about a model, through llama-cpp-python. Exit code 77 when that package is not installed.

    peer_llama.py perplexity MODEL.gguf TEXT CONTEXT    perplexity as llama.cpp's own tool measures it
    peer_llama.py tokens MODEL.gguf TEXT OUT.json       token ids of a text, with the start token where the model adds one
    peer_llama.py logits MODEL.gguf IDS OUT.npy         logits [T, V] of one sequence; IDS are numbers separated by spaces
    peer_llama.py bench MODEL.gguf LAYOUT TESTS         speed; LAYOUT is plain or repacked, TESTS as prompt:512:1,generate:64:8

Prints one JSON object. Run it with the interpreter of the peer's environment (tools/setup.sh peer).
"""

import json
import math
import os
import sys
import time


THREADS = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def load(path, context, **options):
    import llama_cpp

    return llama_cpp.Llama(model_path=path, n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True,
                           n_threads=THREADS, n_threads_batch=THREADS, **{"verbose": False, **options})


def perplexity(path, text, context):
    """Windows of `context` tokens without overlap; a window begins with the token for the start of text where the model adds one;
    the second half of each window is scored, so that every scored token has at least half a window before it."""
    import numpy

    begin = time.time()
    model = load(path, context)
    loaded = time.time()
    with open(text, encoding="utf-8") as f:
        tokens = model.tokenize(f.read().encode(), add_bos=True, special=False)
    bos = model.token_bos() if model._model.add_bos_token() else None
    total, count, first = 0.0, 0, context // 2
    windows = len(tokens) // context
    for w in range(windows):
        window = list(tokens[w * context : (w + 1) * context])
        if bos is not None:
            window[0] = bos
        model.reset()
        model.eval(window)
        scores = model.scores[first : context - 1].astype(numpy.float64)
        peak = scores.max(-1)
        norm = peak + numpy.log(numpy.exp(scores - peak[:, None]).sum(-1))
        total += float((norm - scores[numpy.arange(context - 1 - first), window[first + 1 :]]).sum())
        count += context - 1 - first
    return {"perplexity": math.exp(total / count), "tokens": len(tokens), "windows": windows, "scored": count, "bos": bos,
            "load_s": loaded - begin, "seconds": time.time() - loaded}


def tokens(path, text, out):
    import llama_cpp

    model = llama_cpp.Llama(model_path=path, vocab_only=True, verbose=False)
    with open(text, encoding="utf-8") as f:
        ids = model.tokenize(f.read().encode(), add_bos=True, special=False)
    with open(out, "w") as f:
        json.dump({"ids": ids, "bos": model.token_bos() if model._model.add_bos_token() else None}, f)
    return {"tokens": len(ids)}


def logits(path, ids, out):
    """Keys and values are kept in f32: nothing is rounded but what the formats of the file ask for. Why a file is refused stands in what
    llama.cpp prints."""
    import llama_cpp
    import numpy

    ids = [int(i) for i in ids.split()]
    f32 = llama_cpp.GGML_TYPE_F32
    model = load(path, max(64, len(ids)), type_k=f32, type_v=f32, verbose=True)
    model.eval(ids)
    numpy.save(out, numpy.array(model.scores[: len(ids)], dtype=numpy.float32))
    return {"shape": [len(ids), model.n_vocab()]}


def bench(path, layout, tests):
    """Tokens a second of every KIND:TOKENS:BATCH, as llama-bench and llama-batched-bench measure them: random tokens, prompts in one
    call, one token a sequence and call when generating. The calls go to the library itself."""
    import random

    import llama_cpp as lib

    lib.llama_backend_init()
    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, None)
    options = lib.llama_model_default_params()
    options.use_extra_bufts = layout == "repacked"
    model = lib.llama_model_load_from_file(path.encode(), options)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    out = []
    for kind, tokens, batch in ((k, int(t), int(b)) for k, t, b in (test.split(":") for test in tests.split(","))):
        context = lib.llama_context_default_params()
        context.n_ctx = (tokens + 8) * batch
        context.n_batch = context.n_ubatch = max(tokens * batch, 32) if kind == "prompt" else 64
        context.n_threads = context.n_threads_batch = THREADS
        context.n_seq_max = batch
        state = lib.llama_init_from_model(model, context)
        room = lib.llama_batch_init(int(context.n_batch), 0, 1)

        def decode(positions):
            """One call: every sequence at these positions, logits of the last."""
            n = 0
            for sequence in range(batch):
                for p in positions:
                    room.token[n], room.pos[n], room.n_seq_id[n] = random.randrange(vocabulary), p, 1
                    room.seq_id[n][0], room.logits[n] = sequence, p == positions[-1]
                    n += 1
            room.n_tokens = n
            if lib.llama_decode(state, room) != 0:
                raise RuntimeError("llama_decode failed")
            lib.llama_synchronize(state)

        def clear():
            lib.llama_memory_clear(lib.llama_get_memory(state), True)

        decode([0])
        rates = []
        for _ in range(3):
            clear()
            begin = time.perf_counter()
            if kind == "prompt":
                decode(list(range(tokens)))
            else:
                for p in range(tokens):
                    decode([p])
            rates.append(tokens * batch / (time.perf_counter() - begin))
        out.append({"test": kind, "tokens": tokens, "batch": batch, "tokens_per_second": max(rates)})
        lib.llama_batch_free(room)
        lib.llama_free(state)
    return {"layout": layout, "threads": THREADS, "results": out}


def main():
    try:
        import llama_cpp
    except ImportError:
        print("llama-cpp-python is not installed: tools/setup.sh peer", file=sys.stderr)
        return 77
    if len(sys.argv) != 5 or sys.argv[1] not in ("perplexity", "tokens", "logits", "bench"):
        print(__doc__, file=sys.stderr)
        return 2
    verb, path, a, b = sys.argv[1:]
    verbs = {"tokens": tokens, "logits": logits, "bench": bench}
    result = perplexity(path, a, int(b)) if verb == "perplexity" else verbs[verb](path, a, b)
    print(json.dumps({**result, "llama_cpp_python": llama_cpp.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
