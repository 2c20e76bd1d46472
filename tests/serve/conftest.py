"""One server for the tests that change nothing about it."""

from collections.abc import Iterator

import openai
import pytest

from tests.serve.running import Running, running


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with running() as here:
        yield here


@pytest.fixture(scope="session")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made
