"""Whether a service answers as its OpenAPI page says."""

import hypothesis
import schemathesis
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serving import Service


def check_conforms(one: Service, examples: int) -> None:
    """Requests made from the OpenAPI page, and such as break it, get answers that the page names, and no 5xx."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{one.port}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert [operation.path for operation in operations] == ["/predict", "/health", "/metrics"]
    for operation in operations:
        requests = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode))

        @hypothesis.given(requests)
        @hypothesis.settings(
            max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        def conforms(case):
            # what is no image is refused, though the schema cannot distinguish it from one
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        conforms()
