FROM python:3.13-slim

RUN useradd --system --no-create-home --shell /usr/sbin/nologin consumerd
WORKDIR /opt/consumerd

# First what changes rarely: every package is pinned, and checked by its hash.
COPY requirements.txt ./
RUN pip install --no-cache-dir --require-hashes -r requirements.txt

COPY pyproject.toml README.md ./
COPY consumerd ./consumerd
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

# A config that takes its addresses from the environment; mount your own over /etc/consumerd.
COPY <<'TOML' /etc/consumerd/consumerd.toml
[kafka]
bootstrap_servers = "${KAFKA_BOOTSTRAP_SERVERS}"

[postgres]
dsn = { env = "DATABASE_URL" }

[daemon]
handlers = "handlers"
listen = "0.0.0.0:9464"
TOML
COPY handlers /etc/consumerd/handlers

USER consumerd
EXPOSE 9464
ENTRYPOINT ["consumerd"]
CMD ["run", "-c", "/etc/consumerd/consumerd.toml"]
