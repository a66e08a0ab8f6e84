"""Ask a server what users of the public clients ask. Arguments: its URL and its API key."""

import sys
from base64 import b64decode

import numpy as np
import openai
import pytest
from huggingface_hub import InferenceClient

# Sums in another order: the same number to 1e-5 where vectors have length 1.
TOLERANCE = 1e-5


def main() -> None:
    url, key = sys.argv[1:]
    texts = ["shared prefix one", "shared prefix two", "other"]

    inference = InferenceClient(base_url=url, api_key=key)
    single = np.stack([inference.feature_extraction(text)[0] for text in texts])
    prompted = inference.feature_extraction("one", prompt_name="query", normalize=True, truncate=True)
    assert np.abs(prompted - inference.feature_extraction("find: one")).max() < TOLERANCE
    raw = inference.feature_extraction("one", normalize=False)
    assert abs(np.linalg.norm(raw) - 1) > 0.1

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    for encoding_format in ("float", "base64"):
        answer = client.embeddings.create(input=texts, model="any", encoding_format=encoding_format)
        vectors = [item.embedding for item in answer.data]
        if encoding_format == "base64":
            # The client decodes only what it asked for by itself.
            vectors = [np.frombuffer(b64decode(v), "<f4") for v in vectors]
        assert np.abs(np.array(vectors) - single).max() < TOLERANCE
        assert [item.index for item in answer.data] == [0, 1, 2]
    answer = client.embeddings.create(input=texts, model="any", dimensions=4)
    assert len(answer.data[0].embedding) == 4
    assert answer.usage.total_tokens == sum(len(text) + 1 for text in texts)

    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0)
    for caller, arguments, error in [
        (stranger, {"input": "a"}, openai.AuthenticationError),
        (client, {"input": []}, openai.BadRequestError),
        (client, {"input": "a", "dimensions": 10_000}, openai.UnprocessableEntityError),
    ]:
        with pytest.raises(error) as refused:
            caller.embeddings.create(model="any", **arguments)
        assert refused.value.type


if __name__ == "__main__":
    main()
