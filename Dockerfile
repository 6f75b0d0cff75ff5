# The agent: it reads the journals of the ranks on its node and serves them. It needs no torch and no GPU.
#   docker build -t gradmon-agent:0.1.0 .
FROM python:3.13.16-slim-trixie AS build
WORKDIR /src
RUN python -m venv --without-pip /opt/gradmon
# pyproject.toml stays the only list of dependencies; torch, the one that is left out, is what the ranks need.
COPY pyproject.toml ./
RUN python -c 'import re, tomllib; print(*(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if re.match(r"[\w.-]+", d)[0] != "torch"), sep="\n")' > requirements.txt \
    && pip --python /opt/gradmon install --no-cache-dir -r requirements.txt
COPY LICENSE README.md ./
COPY gradmon gradmon
RUN pip --python /opt/gradmon install --no-cache-dir --no-deps .

FROM python:3.13.16-slim-trixie
LABEL org.opencontainers.image.title="gradmon agent" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/gradmon /opt/gradmon
# A number, so that Kubernetes can check runAsNonRoot. Who shares the volume writes in the group, which the agent reads.
RUN groupadd --gid 10855 gradmon \
    && useradd --uid 10855 --gid 10855 --no-create-home --shell /usr/sbin/nologin gradmon \
    && install -d -o gradmon -g gradmon -m 3770 /var/lib/gradmon \
    && install -d -o gradmon -g gradmon -m 0750 /var/lib/gradmon-archive
ENV PATH=/opt/gradmon/bin:$PATH \
    GRADMON_DIR=/var/lib/gradmon \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10855:10855
EXPOSE 10855
# Asks where the agent says it listens, whatever address, port and scheme that is; /healthz wants no credentials, and
# the certificate's names are for others. An agent with another directory: set GRADMON_DIR rather than --dir.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s \
    CMD ["python", "-c", "import os, pathlib, ssl, urllib.request as r; from gradmon.agent import agent_address as a; r.build_opener(r.ProxyHandler({}), r.HTTPSHandler(context=ssl._create_unverified_context())).open(a(pathlib.Path(os.environ['GRADMON_DIR'])) + '/healthz', timeout=3)"]
ENTRYPOINT ["gradmon"]
CMD ["agent", "--listen", "0.0.0.0"]
