"""`make demo`: run the quickstart, serve its bundle, ask it through the openai client, stop.

Every question is the head of a function that the model has never seen; the answer is the
package of the standard library that the function comes from.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI

LIFECYCLE = [sys.executable, "-m", "lifecycle.cli"]
QUESTIONS = 6


def main() -> int:
    """Run the demo; 0 when the server answered and stopped cleanly."""
    code = subprocess.run([*LIFECYCLE, "run", "quickstart"]).returncode
    if code:
        return code
    command = [*LIFECYCLE, "serve", "quickstart", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = server.stdout.readline().strip()
        if not ready:
            return server.wait()
        print(f"\n{ready}")
        try:
            ask(next(word for word in ready.split() if word.startswith("http")))
        finally:
            server.send_signal(signal.SIGTERM)
    print(f"server stopped with exit code {server.returncode}")
    return server.returncode


def ask(url: str) -> None:
    """Ask some held-out questions, every other one streamed."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    right = 0
    rows = held_out()
    for i, row in enumerate(rows):
        question, expected = row["messages"][-2], row["messages"][-1]["content"]
        streamed = bool(i % 2)
        print(f"\n--- question {i + 1} ({'streamed' if streamed else 'whole'})")
        print(question["content"].strip()[:300])
        print("--- answer: ", end="", flush=True)
        answer = stream(client, model, question) if streamed else whole(client, model, question)
        right += answer.strip() == expected.strip()
        print(f"   (expected: {expected.strip()})")
    print(f"\n{right} of {len(rows)} right")


def whole(client: OpenAI, model: str, question: Any) -> str:
    """One answer at once."""
    done = client.chat.completions.create(
        model=model, messages=[question], temperature=0, max_tokens=16
    )
    answer = done.choices[0].message.content or ""
    print(answer, end="")
    return answer


def stream(client: OpenAI, model: str, question: Any) -> str:
    """One answer as it is made."""
    answer = ""
    for chunk in client.chat.completions.create(
        model=model, messages=[question], temperature=0, max_tokens=16, stream=True
    ):
        text = (chunk.choices[0].delta.content or "") if chunk.choices else ""
        print(text, end="", flush=True)
        answer += text
    return answer


def held_out() -> list[dict[str, Any]]:
    """Questions from the held-out split of the run."""
    command = [*LIFECYCLE, "runs", "show", "quickstart", "--json"]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    rows = Path(shown["stages"]["task"]["path"], "test.jsonl").read_text("utf-8").splitlines()
    return [json.loads(row) for row in rows[:: max(1, len(rows) // QUESTIONS)][:QUESTIONS]]


if __name__ == "__main__":
    sys.exit(main())
