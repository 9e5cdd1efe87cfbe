"""Schemas of the Argo CD Application and ApplicationSet, for the keys that the manifests use.

No Python package contains the definitions of Argo CD. These models were compared with the Go types of version 3
(the npm package @kubernetes-models/argo-cd 4.0.0). An unknown key is an error.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

Version = Literal["argoproj.io/v1alpha1"]
Duration = Annotated[str, StringConstraints(pattern=r"^\d+[smh]$")]


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(_Exact):
    name: str
    namespace: str = ""
    labels: dict[str, str] = Field(default_factory=dict)


class Source(_Exact):
    repo_url: str = Field(alias="repoURL")
    target_revision: str
    path: str


class Destination(_Exact):
    namespace: str
    server: str = ""
    name: str = ""

    @model_validator(mode="after")
    def _is_one_cluster(self) -> "Destination":
        if bool(self.server) is bool(self.name):
            raise ValueError("a destination needs exactly one of server and name")
        return self


class Automated(_Exact):
    prune: bool = False
    self_heal: bool = False


class Backoff(_Exact):
    duration: Duration
    factor: int
    max_duration: Duration


class Retry(_Exact):
    limit: int
    backoff: Backoff


class SyncPolicy(_Exact):
    automated: Automated
    sync_options: list[Annotated[str, StringConstraints(pattern=r"^[A-Za-z]+=[a-z]+$")]]
    retry: Retry | None = None


class Spec(_Exact):
    project: str
    source: Source
    destination: Destination
    sync_policy: SyncPolicy | None = None


class Application(_Exact):
    api_version: Version
    kind: Literal["Application"]
    metadata: Metadata
    spec: Spec


class Selector(_Exact):
    match_labels: dict[str, str]


class Clusters(_Exact):
    selector: Selector


class Generator(_Exact):
    clusters: Clusters


class Template(_Exact):
    metadata: Metadata
    spec: Spec


class Matching(_Exact):
    key: str
    operator: Literal["In", "NotIn"]
    values: list[str]


class Step(_Exact):
    match_expressions: list[Matching]


class Rolling(_Exact):
    steps: list[Step]


class Strategy(_Exact):
    type: Literal["RollingSync"]
    rolling_sync: Rolling


class SetSpec(_Exact):
    go_template: Literal[True]
    go_template_options: list[Literal["missingkey=error"]]
    generators: Annotated[list[Generator], Field(min_length=1)]
    template: Template
    strategy: Strategy | None = None


class ApplicationSet(_Exact):
    api_version: Version
    kind: Literal["ApplicationSet"]
    metadata: Metadata
    spec: SetSpec
