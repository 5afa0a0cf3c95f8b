FROM python:3.13.12-slim-bookworm

# By number, so that Kubernetes can tell that it is not root (runAsNonRoot).
RUN groupadd --gid 10001 consumerd && \
    useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin consumerd
WORKDIR /opt/consumerd

# First what changes rarely: every package is pinned, and checked by its hash.
COPY requirements.txt ./
RUN pip install --no-cache-dir --require-hashes -r requirements.txt

COPY pyproject.toml README.md ./
COPY consumerd ./consumerd
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

# Mount your own over either.
COPY deploy/consumerd.toml /etc/consumerd/consumerd.toml
COPY handlers /etc/consumerd/handlers

USER 10001:10001
EXPOSE 9464
ENTRYPOINT ["consumerd"]
CMD ["run"]
