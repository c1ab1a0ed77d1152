"""Seconds and peak memory of the stages of a run: `start` before it, `show` after it."""

import argparse
import json

from stages import scratch

FILE = scratch.FOLDER / "timings.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["start", "show"])
    if parser.parse_args().action == "start":
        FILE.unlink(missing_ok=True)
        return
    rows = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    if not rows:
        print("No stage had to run: everything is up to date.")
        return
    print(f"\n{'stage':<28}{'seconds':>9}{'peak GB':>9}")
    for row in rows:
        print(f"{row['stage']:<28}{row['seconds']:>9.1f}{row['peak_gb']:>9.2f}")
    print(f"{'sum, highest':<28}{sum(r['seconds'] for r in rows):>9.1f}{max(r['peak_gb'] for r in rows):>9.2f}")


if __name__ == "__main__":
    main()
