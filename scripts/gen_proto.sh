#!/usr/bin/env bash
# Generate src/ddplog/v1 from proto/. Generated with the oldest protoc we support (4.25), since
# generated code refuses runtimes older than itself. Needs: grpcio-tools==1.62.3 mypy-protobuf==3.6.0
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m grpc_tools.protoc -I proto --python_out=src --pyi_out=src --grpc_python_out=src \
    proto/ddplog/v1/data.proto proto/ddplog/v1/control.proto
touch src/ddplog/v1/__init__.py
