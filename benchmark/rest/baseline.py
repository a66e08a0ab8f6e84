"""sentence-transformers behind /embed, as people deploy it: FastAPI, one model, one request at a time.

python benchmark/rest/baseline.py MODEL --port 3001
"""

import argparse
import threading

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer


class EmbedRequest(BaseModel):
    inputs: list[str]


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def application(directory: str, device: str, dtype: str) -> FastAPI:
    transformer = Transformer(directory, model_kwargs={"dtype": DTYPES[dtype]})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling], device=device)
    # Requests come on several threads, and the model has the cores or the GPU to itself.
    one_at_a_time = threading.Lock()
    app = FastAPI()

    @app.get("/health")
    def health() -> None:
        return None

    @app.post("/embed")
    def embed(request: EmbedRequest) -> list[list[float]]:
        with one_at_a_time:
            vectors: list[list[float]] = model.encode(request.inputs, normalize_embeddings=True).tolist()
        return vectors

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a Hugging Face model with its tokenizer")
    parser.add_argument("--port", type=int, default=3001)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    options = parser.parse_args()
    uvicorn.run(application(options.model, options.device, options.dtype), port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
