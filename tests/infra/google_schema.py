"""What arguments and blocks the resources in infra/terraform have, from the provider's own schema.

`terraform validate` needs the provider, a download of its own. Its schema is also in HashiCorp's TypeScript bindings, as
declarations; of those, the resources in use are kept in google_schema.json. To renew, for the version that versions.tf pins:

    npm pack @cdktf/provider-google@16.12.1 && tar xzf cdktf-provider-google-16.12.1.tgz
    python -m tests.infra.google_schema package
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.infra.terraform import blocks

SCHEMA = Path(__file__).with_name("google_schema.json")
FIELD = re.compile(r"#(\w+) \w+#\w+\}(?:(?!\*/).)*\*/\s*readonly \w+(\??): ([^;]+?)[;\n]", re.DOTALL)


def declared(text: str, interface: str) -> dict[str, Any]:
    """The fields of one interface: name -> {required, and for a block its own fields}."""
    body = re.search(rf"export interface {interface}( extends [\w.]+)? \{{\n(.*?)\n\}}", text, re.DOTALL)
    assert body, interface
    fields: dict[str, Any] = {}
    for name, optional, kind in FIELD.findall(body[2]):
        inner = re.match(r"[A-Z]\w+", kind.strip())
        fields[name] = {"required": not optional}
        if inner and f"export interface {inner[0]} {{" in text:
            fields[name]["block"] = declared(text, inner[0])
    return fields


def resource(package: Path, kind: str, name: str) -> dict[str, Any]:
    """A resource's (or data source's) arguments, and the attributes that it can be asked for."""
    dashed = name.removeprefix("google_").replace("_", "-")
    folder = package / "lib" / (dashed if kind == "resource" else f"data-google-{dashed}")
    text = (folder / "index.d.ts").read_text()
    config = re.findall(r"export interface (\w+) extends cdktf\.TerraformMetaArguments", text)
    main = text[text.index(" extends cdktf.Terraform", text.index("export declare class") if kind else 0) :]
    getters = re.findall(r"^    get (\w+)\(\)", main, re.MULTILINE)
    exported = sorted(
        {
            re.sub(r"(?<=[a-z0-9])([A-Z])", lambda found: f"_{found[1].lower()}", each)
            for each in getters
            if not each.endswith("Input")
        }
    )
    version = re.search(r"providers/hashicorp/google/([\d.]+)/", text)
    assert version
    return {"provider": version[1], "fields": declared(text, config[0]), "exports": exported}


if __name__ == "__main__":
    used = sorted({(block.kind, block.labels[0]) for block in blocks() if block.kind in ("resource", "data")})
    made = {f"{kind} {name}": resource(Path(sys.argv[1]), kind, name) for kind, name in used}
    SCHEMA.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    print(f"{len(made)} resources in {SCHEMA}")
