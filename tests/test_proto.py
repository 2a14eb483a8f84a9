"""Proves that src/ddplog/v1 was generated from proto/ as it stands now.

Compares what the .proto files say with the descriptors of the generated modules: messages, fields (name, number,
type, label, oneof), enums and their values, services and their methods. By descriptors, not by text, since two
protoc versions write different text. A small parser, so that the check needs no protoc; where grpc_tools is
installed, protoc's own descriptors are compared as well.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, json_format
from google.protobuf.descriptor import FieldDescriptor

from ddplog.v1 import control_pb2, data_pb2

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
GENERATED = {"ddplog/v1/control.proto": control_pb2, "ddplog/v1/data.proto": data_pb2}

TOKEN = re.compile(r'\s+|//[^\n]*|/\*.*?\*/|"(?:[^"\\]|\\.)*"|[A-Za-z_][\w.]*|-?\d+|[{}\[\]()<>=;,.]', re.DOTALL)
SCALARS = {
    name.removeprefix("TYPE_").lower(): number
    for name, number in vars(FieldDescriptor).items()
    if name.startswith("TYPE_") and name not in ("TYPE_MESSAGE", "TYPE_ENUM", "TYPE_GROUP")
}


class Parser:
    """Reads the part of proto3 that we write; anything else is an error, never skipped.

    The result maps each full name to what it is: ("message",), ("field", number, type, label, oneof),
    ("enum",), ("value", number), ("service",) or ("method", input, output, streams in, streams out).
    """

    def __init__(self, text: str) -> None:
        self.tokens = []
        offset = 0
        while offset < len(text):
            match = TOKEN.match(text, offset)
            if match is None:
                raise SyntaxError(f"cannot read {text[offset : offset + 20]!r}")
            if not match.group().isspace() and not match.group().startswith(("//", "/*")):
                self.tokens.append(match.group())
            offset = match.end()
        self.tokens.reverse()
        self.package = ""
        self.found: dict[str, tuple] = {}

    def take(self, *wanted: str) -> str:
        token = self.tokens.pop()
        if wanted and token not in wanted:
            raise SyntaxError(f"{token!r} where {' or '.join(wanted)} was expected")
        return token

    def accept(self, token: str) -> bool:
        if self.tokens and self.tokens[-1] == token:
            self.tokens.pop()
            return True
        return False

    def parse(self) -> dict[str, tuple]:
        self.take("syntax"), self.take("="), self.take('"proto3"'), self.take(";")
        self.take("package")
        self.package = self.take()
        self.take(";")
        while self.tokens:
            kind = self.take("message", "enum", "service")
            getattr(self, f"parse_{kind}")(self.package)
        return {name: self.resolve(name, what) for name, what in self.found.items()}

    def add(self, scope: str, what: tuple) -> str:
        name = f"{scope}.{self.take()}"
        if name in self.found:
            raise SyntaxError(f"{name} twice")
        self.found[name] = what
        return name

    def parse_message(self, scope: str) -> None:
        name = self.add(scope, ("message",))
        self.take("{")
        while not self.accept("}"):
            if self.accept("message"):
                self.parse_message(name)
            elif self.accept("enum"):
                self.parse_enum(name)
            elif self.accept("oneof"):
                oneof = self.take()
                self.take("{")
                while not self.accept("}"):
                    self.parse_field(name, "optional", oneof)
            else:
                label = "repeated" if self.accept("repeated") else "optional"
                explicit = label == "optional" and self.accept("optional")
                self.parse_field(name, label, "explicit" if explicit else None)

    def parse_field(self, scope: str, label: str, oneof: str | None) -> None:
        type_name = self.take()
        name = self.take()
        self.take("=")
        number = int(self.take())
        self.take(";")
        if f"{scope}.{name}" in self.found:
            raise SyntaxError(f"{scope}.{name} twice")
        presence = f"_{name}" if oneof == "explicit" else oneof
        self.found[f"{scope}.{name}"] = ("field", number, type_name, label, presence)

    def parse_enum(self, scope: str) -> None:
        name = self.add(scope, ("enum",))
        self.take("{")
        while not self.accept("}"):
            value = f"{name}.{self.take()}"
            self.take("=")
            self.found[value] = ("value", int(self.take()))
            self.take(";")

    def parse_service(self, scope: str) -> None:
        name = self.add(scope, ("service",))
        self.take("{")
        while not self.accept("}"):
            self.take("rpc")
            method = f"{name}.{self.take()}"
            given, streams_in = self.parse_argument()
            self.take("returns")
            returned, streams_out = self.parse_argument()
            self.take(";")
            self.found[method] = ("method", given, returned, streams_in, streams_out)

    def parse_argument(self) -> tuple[str, bool]:
        self.take("(")
        streams = self.accept("stream")
        name = self.take()
        self.take(")")
        return name, streams

    def resolve(self, name: str, what: tuple) -> tuple:
        """Replace the type names of a field or method by full names, looked for from the inside out."""
        if what[0] == "field" and what[2] not in SCALARS:
            return (*what[:2], self.full_name(name, what[2]), *what[3:])
        if what[0] == "method":
            return (what[0], self.full_name(name, what[1]), self.full_name(name, what[2]), *what[3:])
        return what

    def full_name(self, name: str, wanted: str) -> str:
        scope = name
        while scope:
            scope = scope.rpartition(".")[0]
            candidate = f"{scope}.{wanted}" if scope else wanted
            if self.found.get(candidate) in (("message",), ("enum",)):
                return candidate
        raise SyntaxError(f"{name}: no type {wanted}")


def described(file: descriptor_pb2.FileDescriptorProto) -> dict[str, tuple]:
    """Return the same map as Parser.parse(), from protoc's descriptors."""
    found: dict[str, tuple] = {}
    for message in file.message_type:
        describe_message(found, file.package, message)
    for enum in file.enum_type:
        describe_enum(found, file.package, enum)
    for service in file.service:
        name = f"{file.package}.{service.name}"
        found[name] = ("service",)
        for method in service.method:
            found[f"{name}.{method.name}"] = (
                "method",
                method.input_type.removeprefix("."),
                method.output_type.removeprefix("."),
                method.client_streaming,
                method.server_streaming,
            )
    return found


def describe_message(found: dict[str, tuple], scope: str, message: descriptor_pb2.DescriptorProto) -> None:
    name = f"{scope}.{message.name}"
    found[name] = ("message",)
    names = {number: scalar for scalar, number in SCALARS.items()}
    for field in message.field:
        label = "repeated" if field.label == FieldDescriptor.LABEL_REPEATED else "optional"
        oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else None
        type_name = field.type_name.removeprefix(".") or names[field.type]
        found[f"{name}.{field.name}"] = ("field", field.number, type_name, label, oneof)
    for nested in message.nested_type:
        describe_message(found, name, nested)
    for enum in message.enum_type:
        describe_enum(found, name, enum)


def describe_enum(found: dict[str, tuple], scope: str, enum: descriptor_pb2.EnumDescriptorProto) -> None:
    name = f"{scope}.{enum.name}"
    found[name] = ("enum",)
    found.update({f"{name}.{value.name}": ("value", value.number) for value in enum.value})


def as_proto(module) -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    return file


def test_every_proto_file_has_its_module_and_no_other():
    assert {str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto")} == set(GENERATED)


@pytest.mark.parametrize("name", GENERATED)
def test_the_generated_code_is_current(name):
    """If this fails, run scripts/gen_proto.sh."""
    file = as_proto(GENERATED[name])
    assert file.name == name
    assert file.syntax == "proto3"
    assert described(file) == Parser((PROTO / name).read_text(encoding="utf-8")).parse()


@pytest.mark.parametrize("name", GENERATED)
def test_the_stubs_are_current(name):
    """The .pyi is what mypy believes."""
    path = ROOT / "src" / name.replace(".proto", "_pb2.pyi")
    file = as_proto(GENERATED[name])
    slots = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.Assign) and line.targets[0].id == "__slots__":
                    slots[node.name] = list(ast.literal_eval(line.value))
    assert slots == {message.name: [field.name for field in message.field] for message in file.message_type}


@pytest.mark.parametrize("name", GENERATED)
def test_the_grpc_code_is_current(name):
    """It carries no descriptor: the full name of each method must be in it, and of no other."""
    text = (ROOT / "src" / name.replace(".proto", "_pb2_grpc.py")).read_text(encoding="utf-8")
    file = as_proto(GENERATED[name])
    written = set(re.findall(r"'/([\w.]+/\w+)'", text))
    assert written == {f"{file.package}.{s.name}/{m.name}" for s in file.service for m in s.method}
    for service in file.service:
        for method in service.method:
            kind = (
                f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
            )
            assert re.search(rf"self\.{method.name} = channel\.{kind}\(", text)


@pytest.mark.system
@pytest.mark.parametrize("name", GENERATED)
def test_protoc_agrees(name, tmp_path):
    pytest.importorskip("grpc_tools", reason="grpc_tools is in the group proto only")
    output = tmp_path / "set"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTO), f"--descriptor_set_out={output}", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()).file
    assert described(file) == described(as_proto(GENERATED[name]))


# --- the check can fail -----------------------------------------------------------------------------------------

SAMPLE = """
// A comment; with { braces }.
syntax = "proto3";
package a.b;
service S { rpc One(In) returns (Out); rpc Two(stream In) returns (stream Out); }
message In {
  enum Kind { NONE = 0; SOME = 1; }
  message Part { bytes data = 1; }
  repeated Part parts = 1;  /* and another
  comment */
  optional int64 step = 2;
  Kind kind = 3;
  oneof choice { string text = 4; Out out = 5; }
}
message Out {}
"""

DRIFTS = {
    "a message more": ("message Out {}", "message Out {} message More {}"),
    "a message renamed": ("message Out {}", "message Out { } enum X { Y = 0; }"),
    "a field renamed": ("step = 2", "stage = 2"),
    "a field's number": ("step = 2", "step = 6"),
    "a field's type": ("int64 step", "sint64 step"),
    "a field's label": ("repeated Part", "Part"),
    "a field's presence": ("optional int64", "int64"),
    "a field out of its oneof": ("oneof choice { string text = 4;", "string text = 4; oneof choice {"),
    "an oneof renamed": ("oneof choice", "oneof choices"),
    "a field of another message": ("Part parts", "Out parts"),
    "a field less": ("Kind kind = 3;", ""),
    "an enum's value": ("SOME = 1", "SOME = 2"),
    "an enum's name": ("SOME = 1", "ANY = 1"),
    "an enum's value more": ("SOME = 1;", "SOME = 1; MORE = 2;"),
    "a method renamed": ("rpc One", "rpc Uno"),
    "a method's argument": ("One(In)", "One(Out)"),
    "a method's answer": ("One(In) returns (Out)", "One(In) returns (In)"),
    "a method that streams in": ("One(In)", "One(stream In)"),
    "a method that streams out": ("One(In) returns (Out)", "One(In) returns (stream Out)"),
    "another package": ("package a.b", "package a.c"),
}


def test_the_parser_reads_what_protoc_describes():
    """SAMPLE, written out as protoc would describe it."""
    out = ".a.b.Out"
    message = {
        "name": "In",
        "field": [
            {
                "name": "parts",
                "number": 1,
                "label": "LABEL_REPEATED",
                "type": "TYPE_MESSAGE",
                "typeName": ".a.b.In.Part",
            },
            {"name": "step", "number": 2, "type": "TYPE_INT64", "oneofIndex": 1, "proto3Optional": True},
            {"name": "kind", "number": 3, "type": "TYPE_ENUM", "typeName": ".a.b.In.Kind"},
            {"name": "text", "number": 4, "type": "TYPE_STRING", "oneofIndex": 0},
            {"name": "out", "number": 5, "type": "TYPE_MESSAGE", "typeName": out, "oneofIndex": 0},
        ],
        "oneofDecl": [{"name": "choice"}, {"name": "_step"}],
        "nestedType": [{"name": "Part", "field": [{"name": "data", "number": 1, "type": "TYPE_BYTES"}]}],
        "enumType": [{"name": "Kind", "value": [{"name": "NONE", "number": 0}, {"name": "SOME", "number": 1}]}],
    }
    methods = [
        {"name": "One", "inputType": ".a.b.In", "outputType": out},
        {"name": "Two", "inputType": ".a.b.In", "outputType": out, "clientStreaming": True, "serverStreaming": True},
    ]
    whole = {"package": "a.b", "messageType": [message, {"name": "Out"}], "service": [{"name": "S", "method": methods}]}
    assert Parser(SAMPLE).parse() == described(json_format.ParseDict(whole, descriptor_pb2.FileDescriptorProto()))


@pytest.mark.parametrize(("old", "new"), DRIFTS.values(), ids=DRIFTS)
def test_a_drift_is_seen(old, new):
    assert SAMPLE.count(old) == 1
    assert Parser(SAMPLE.replace(old, new)).parse() != Parser(SAMPLE).parse()


@pytest.mark.parametrize(
    "text",
    [
        'syntax = "proto2"; package a;',
        'syntax = "proto3"; import "x"; package a;',
        'syntax = "proto3"; package a; message M { map<string, int32> m = 1; }',
        'syntax = "proto3"; package a; message M { Missing m = 1; }',
        'syntax = "proto3"; package a; message M { int32 m = 1 [packed = false]; }',
        'syntax = "proto3"; package a; message M {} message M {}',
        'syntax = "proto3"; package a; message M { int32 m = 1; int32 m = 2; }',
        'syntax = "proto3"; package a; message M { reserved 2; }',
        'syntax = "proto3"; package a; message M { ? }',
    ],
)
def test_the_parser_refuses_what_it_does_not_know(text):
    """Rather than to skip it and call the rest equal."""
    with pytest.raises(SyntaxError):
        Parser(text).parse()
