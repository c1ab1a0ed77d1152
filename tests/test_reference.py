"""Which pairs are trained on, and which of their tokens."""

from typing import Any

import pyarrow as pa
import tables
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import params, reference, schemas

K = 3
ids = st.lists(st.integers(0, 9), min_size=1, max_size=30)
prompts = st.tuples(ids, st.lists(ids, min_size=K, max_size=K), st.integers(0, K - 1), st.integers(0, K - 1))


def naive(row: dict[str, Any], ranking: dict[str, Any], lengths: params.Lengths) -> dict[str, Any] | None:
    """The pair of one prompt, by Python's lists; None where there is none."""
    drawn = [row["token_ids"][ranking[side]] for side in ("winner", "loser")]
    prompt = row["prompt_token_ids"][-lengths.prompt :]
    cut = [response[: lengths.total - len(prompt)] for response in drawn]
    if ranking["tie"] or (lengths.too_long == "drop" and ([prompt, *cut] != [row["prompt_token_ids"], *drawn])):
        return None
    return {
        "prompt_id": row["prompt_id"],
        "prompt_token_ids": prompt,
        "chosen_token_ids": cut[0],
        "rejected_token_ids": cut[1],
        "chosen_probability": ranking["probabilities"][ranking["winner"]],
        "rejected_probability": ranking["probabilities"][ranking["loser"]],
        "prompt_cut": len(row["prompt_token_ids"]) - len(prompt),
        "chosen_cut": len(drawn[0]) - len(cut[0]),
        "rejected_cut": len(drawn[1]) - len(cut[1]),
    }


@settings(deadline=None)
@given(
    st.lists(prompts, min_size=2, max_size=9),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(["drop", "truncate"]),
    st.data(),
)
def test_pairs_are_those_that_lists_give_row_by_row(
    drawn: list[Any], longest: int, more: int, too_long: Any, data: st.DataObject
) -> None:
    """Tables in several parts, and slices of others, as files and shards give them."""
    (response, *_), (_, ranking) = tables.responses(K), tables.rankings()
    rows, ranked = [], []
    for index, (prompt, answers, winner, loser) in enumerate(drawn):
        rows.append(response | {"prompt_id": f"{index}", "prompt_token_ids": prompt, "token_ids": answers})
        probabilities = [index + sample / 10 for sample in range(K)]
        ranked.append(
            ranking
            | {
                "prompt_id": f"{index}",
                "probabilities": probabilities,
                "winner": winner,
                "loser": loser,
                "tie": winner == loser,
            }
        )
    cut = data.draw(st.integers(0, len(rows)))
    whole = pa.Table.from_pylist(rows, schema=schemas.RESPONSES)
    responses = pa.concat_tables([whole.slice(0, cut), whole.slice(cut)])
    rankings = pa.Table.from_pylist(ranked[:1] + ranked, schema=schemas.RANKINGS).slice(1)
    lengths = params.Lengths(prompt=longest, total=longest + more, too_long=too_long)
    wanted = [pair for row, one in zip(rows, ranked, strict=True) if (pair := naive(row, one, lengths))]
    if wanted:
        found = reference.pairs(responses, rankings, lengths)
        assert found.schema == schemas.CHOSEN
        assert found.to_pylist() == wanted
