BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL,
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
CREATE TABLE models (
	name VARCHAR(96) NOT NULL,
	current_number INTEGER,
	last_number INTEGER NOT NULL,
	PRIMARY KEY (name)
);
INSERT INTO "models" VALUES('sql',1,2);
INSERT INTO "models" VALUES('full',1,1);
INSERT INTO "models" VALUES('gone',NULL,4);
CREATE TABLE versions (
	name VARCHAR(96) NOT NULL,
	number INTEGER NOT NULL,
	digest VARCHAR(71) NOT NULL,
	kind VARCHAR(16) NOT NULL,
	placement VARCHAR(16) NOT NULL,
	reasons JSON NOT NULL,
	rank INTEGER,
	size_bytes BIGINT NOT NULL,
	created_at DATETIME NOT NULL,
	chat_template TEXT,
	stop_token_ids JSON NOT NULL,
	manifest JSON NOT NULL, base JSON,
	PRIMARY KEY (name, number),
	FOREIGN KEY(name) REFERENCES models (name)
);
INSERT INTO "versions" VALUES('sql',1,'sha256:0000000000000000000000000000000000000000000000000000000000000001','lora','shared','[]',8,1,'2026-10-01 12:00:00.000000','{{ x }}','[2, 5]','{"files": [{"path": "adapter_config.json", "size_bytes": 1, "sha256": "0000000000000000000000000000000000000000000000000000000000000001"}]}','{"name": "m", "config_sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "weights_sample": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"}');
INSERT INTO "versions" VALUES('sql',2,'sha256:0000000000000000000000000000000000000000000000000000000000000002','lora','shared','[]',16,2,'2026-10-02 12:00:00.000000',NULL,'[]','{"files": [{"path": "adapter_config.json", "size_bytes": 2, "sha256": "0000000000000000000000000000000000000000000000000000000000000002"}]}','{"name": "m", "config_sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "weights_sample": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"}');
INSERT INTO "versions" VALUES('full',1,'sha256:0000000000000000000000000000000000000000000000000000000000000003','full','dedicated','[{"code": "full_weights", "message": "complete weights", "where": "", "fix": ""}]',NULL,3,'2026-10-03 12:00:00.000000',NULL,'[]','{"files": [{"path": "adapter_config.json", "size_bytes": 3, "sha256": "0000000000000000000000000000000000000000000000000000000000000003"}]}',NULL);
CREATE INDEX versions_by_digest ON versions (digest);
COMMIT;
