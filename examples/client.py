"""Ask a server that runs (openmythos serve), and show the answer while it comes.

python examples/client.py text "The loop" --num-loops 4
"""

import argparse
import json
import urllib.request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name in /v1/models")
    parser.add_argument("prompt")
    parser.add_argument("--num-loops", type=int, default=4, help="loops of each token")
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    given = parser.parse_args()

    body = {
        "model": given.model,
        "prompt": given.prompt,
        "max_tokens": given.max_tokens,
        "num_loops": given.num_loops,
        "include_loops": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{given.url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    print(given.prompt, end="", flush=True)
    with urllib.request.urlopen(request) as answer:
        for line in answer:  # server-sent events: data: {...}, and data: [DONE] at the end
            text = line.decode().removeprefix("data: ").strip()
            if not text or text == "[DONE]":
                continue
            event = json.loads(text)
            for choice in event["choices"]:
                print(choice["text"], end="", flush=True)
            if usage := event.get("usage"):
                print("\nloops:", usage["loops"])


if __name__ == "__main__":
    main()
