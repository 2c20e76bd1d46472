"""The schema says what the server answers."""

from typing import Any

from tests.serve.running import Running


def test_errors_are_described_in_their_own_form(server: Running) -> None:
    made = server.client.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"):
        answers = answers_of(made, path, "post")
        assert set(answers) == {
            "200",
            "400",
            "401",
            "404",
            "405",
            "408",
            "413",
            "429",
            "500",
            "503",
        }
        told = answers["400"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        assert "error" in made["components"]["schemas"][told]["properties"]
    assert "422" not in str(made["paths"]) and "ValidationError" not in str(made["components"])
    assert (
        "text/event-stream" in made["paths"]["/v1/responses"]["post"]["responses"]["200"]["content"]
    )
    body = made["components"]["schemas"]["CompletionBody"]["properties"]
    assert body["model"]["enum"] == ["small"]
    assert {"200", "400", "404", "429", "503"} <= set(answers_of(made, "/v1/reading", "post"))
    reading = made["components"]["schemas"]["ReadingAnswer"]["properties"]
    assert {"columns", "necessity", "sufficiency", "difference"} <= set(reading)
    assert set(answers_of(made, "/health", "get")) == {"200", "503"}


def answers_of(made: dict[str, Any], path: str, method: str) -> dict[str, Any]:
    found: dict[str, Any] = made["paths"][path][method]["responses"]
    return found
