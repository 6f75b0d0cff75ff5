# The agent: it reads the journals of the ranks on its node and serves them. It needs no torch and no GPU.
FROM python:3.13-slim AS build
WORKDIR /src
RUN python -m venv --without-pip /opt/gradmon
# pyproject.toml stays the only list of dependencies; torch, the one that is left out, is what the ranks need.
COPY pyproject.toml ./
RUN python -c 'import re, tomllib; print(*(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if re.match(r"[\w.-]+", d)[0] != "torch"), sep="\n")' > requirements.txt \
    && pip --python /opt/gradmon install --no-cache-dir -r requirements.txt
COPY LICENSE README.md ./
COPY gradmon gradmon
RUN pip --python /opt/gradmon install --no-cache-dir --no-deps .

FROM python:3.13-slim
LABEL org.opencontainers.image.title="gradmon agent" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/gradmon /opt/gradmon
# A number, so that Kubernetes can check runAsNonRoot; journals of another user need that user's (or group's) id.
RUN groupadd --gid 10855 gradmon \
    && useradd --uid 10855 --gid 10855 --no-create-home --shell /usr/sbin/nologin gradmon \
    && install -d -o gradmon -g gradmon -m 0755 /var/lib/gradmon
ENV PATH=/opt/gradmon/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10855:10855
EXPOSE 10855
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:10855/healthz', timeout=3)"]
ENTRYPOINT ["gradmon"]
CMD ["agent", "--listen", "0.0.0.0", "--dir", "/var/lib/gradmon"]
